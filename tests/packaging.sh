#!/usr/bin/env bash
# Installs pykernels in each supported way into a fresh environment that sees the current one's torch, and runs one
# operator from outside the repository. The PyPI package `kernels` stands beside it: our kernels/ folder must not shadow
# it, nor be broken by it.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
base=$repo/.venv/bin/python
[ -x "$base" ] || base=$(command -v python3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fresh() {  # fresh NAME: an environment that borrows torch and the build tools from the current one
  "$base" -m venv --without-pip "$work/$1"
  "$base" - "$work/$1" <<'PY'
import pathlib, sys, sysconfig
site = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
# a .pth of its site-packages, without processing the .pth files there: an editable pykernels must stay invisible
(site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
PY
  # The same ninja too: another version would compile everything again.
  ninja=$("$base" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/ninja
  [ -x "$ninja" ] && ln -s "$ninja" "$work/$1/bin/ninja" || true
}
check() {  # check NAME BACKEND: import and run outside the repository, nothing of it on the path, and no compiler
  (cd "$work" && PATH=$work/$1/bin "$work/$1/bin/python" - "$2" <<'PY'
import shutil, sys, torch, pykernels
assert not shutil.which("g++") and not shutil.which("cc")
x = torch.randn(5, 7)
y = pykernels.functional.gelu(x, backend=sys.argv[1])
torch.testing.assert_close(y, torch.nn.functional.gelu(x))
import pykernels._triton._lib
import kernels
assert "pykernels" not in kernels.__file__ and hasattr(kernels, "get_kernel"), kernels.__file__
print("  ", pykernels.__file__, sys.argv[1], "ok")
PY
  )
}
tree=$work/tree
git -C "$repo" archive --format=tar --prefix=tree/ HEAD | tar -x -C "$work"
# The archive has no git metadata and no build products: what a user who downloads a release has.
pip() { "$work/$1/bin/python" -m pip "${@:2}"; }

echo "wheel, with the CPU extension, made as pip does by default: in an environment without torch"
fresh wheel
"$base" -m pip install -q --target "$work/extra" kernels
for site in "$work"/wheel/lib/python*/site-packages; do echo "$work/extra" > "$site/extra.pth"; done
# From the repository, so that what is compiled there already serves; that a release holds every source is checked below.
PYKERNELS_BUILD=cpu pip wheel wheel -q "$repo" --no-deps -w "$work/dist"
pip wheel install -q --no-deps "$work"/dist/*.whl
check wheel cpu

echo "sdist, installed without a compiler"
(cd "$tree" && PYKERNELS_BUILD=none "$work/wheel/bin/python" -c "
import setuptools.build_meta as b; print(b.build_sdist('$work/dist'))" > /dev/null 2>&1)
"$base" - "$work" <<'PY'
import pathlib, sys, tarfile
work = pathlib.Path(sys.argv[1])
(archive,) = (work / "dist").glob("*.tar.gz")
with tarfile.open(archive) as tar:
    held = {name.partition("/")[2] for name in tar.getnames()}
tree = work / "tree"
needed = {str(p.relative_to(tree)) for f in ("csrc", "pykernels", "pykernels/_triton") for p in (tree / f).rglob("*") if p.is_file()}
missing = sorted(needed - held)
assert not missing, f"not in the sdist: {missing}"
PY
fresh sdist
for site in "$work"/sdist/lib/python*/site-packages; do echo "$work/extra" > "$site/extra.pth"; done
CXX=no-such-compiler PATH=$work/sdist/bin:/usr/bin:/bin pip sdist install -q --no-deps --no-build-isolation "$work"/dist/*.tar.gz
check sdist reference

echo "editable"
fresh editable
for site in "$work"/editable/lib/python*/site-packages; do echo "$work/extra" > "$site/extra.pth"; done
PYKERNELS_BUILD=none pip editable install -q --no-deps --no-build-isolation -e "$tree"
check editable reference
echo "packaging: 3 ways passed"
