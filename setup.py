"""Builds pykernels' three extension modules into the package, each only where it can be built.

| module | compiler | needs | holds |
|---|---|---|---|
| pykernels._cpu_ext      | g++  | torch (headers, libraries) | native CPU kernels, TORCH_LIBRARY implementations |
| pykernels._emulator_ext | g++  | -                          | csrc/cuda compiled for the CPU, every access checked |
| pykernels._cuda_ext     | nvcc | -                          | csrc/cuda for GPUs, torch-free, static cudart |

What cannot be built is left out with one line saying why (and `pykernels info` repeats it); the package then works
without it. pip builds in an environment of its own, without torch: the torch that counts is then that of the
environment which pip installs into, and its interpreter is asked. All modules are written into one ninja file, because
kernels need flags per file (instruction sets, instrumentation, GPU architectures), which setuptools cannot express.

PYKERNELS_BUILD: auto (default: cpu, and cuda where nvcc is found), all (auto plus the emulator), none, or a comma
list of cpu, cuda, emulator; what a list names, or `all` names and nvcc can serve, must build. TORCH_CUDA_ARCH_LIST,
MAX_JOBS, CUDA_HOME and CXX are respected.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or "g++"
KINDS = ("cpu", "emulator", "cuda")
ROOMS = ("activation", "attention", "recurrent", "embedding", "sampled_softmax")
OLDEST_TORCH = (2, 11)  # as in pyproject.toml
OLDEST_GXX = 11  # the first with AMX
STRICT_GXX = 12  # CI's: only its warnings are known to be none, so only there are they errors

# -fno-gnu-unique and hidden visibility: the modules share symbol names and live in one process.
COMMON = f"-std=c++20 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-gnu-unique -I{CSRC}"
CPU = "-O3 -g0 -fopenmp -fno-math-errno -fno-trapping-math -Wno-uninitialized -Wno-maybe-uninitialized"
# The hooks that -fsanitize=thread and friends insert are answered by the emulator's own checker, not by libtsan.
CHECKED = "-O1 -g1 -x c++ -fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -DPK_ISA=avx2",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512 "
    "-DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512 -DPK_ISA=avx512",
    "amx": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512 -mavx512bf16 "
    "-mamx-tile -mamx-bf16 -DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512 -DPK_ISA=amx",
}


ASK_TORCH = """
import json, torch
from torch.utils import cpp_extension as c
print(json.dumps([torch.__version__, c.include_paths(), c.library_paths()[0], int(torch.compiled_with_cxx11_abi())]))
"""


@functools.lru_cache
def torch_here() -> tuple[str, list[str], str, int] | None:
    """Version, include folders, library folder and C++ ABI of torch, or None."""
    for options in ([], ["-E"]):  # -E forgets the PYTHONPATH by which pip hides the environment that it installs into
        answer = subprocess.run([sys.executable, *options, "-c", ASK_TORCH], cwd="/", capture_output=True, text=True)
        if answer.returncode == 0:
            return tuple(json.loads(answer.stdout.splitlines()[-1]))
    return None


def pybind11_include() -> str:
    """The headers that torch ships, at a path that stays (pip's own environments come and go); else the package's."""
    shipped = [p for p in (torch_here() or ("", []))[1] if Path(p, "pybind11").is_dir()]
    if shipped:
        return shipped[0]
    import pybind11

    return pybind11.get_include()


@functools.lru_cache
def gxx() -> int | None:
    """The major version of the C++ compiler, where it is a g++."""
    if shutil.which(CXX.split()[0]) is None or not Path(CXX.split()[0]).name.startswith("g++"):
        return None
    version = subprocess.run([*CXX.split(), "-dumpfullversion"], capture_output=True, text=True).stdout
    return int(version.split(".")[0]) if version[:1].isdigit() else None


def warnings() -> str:
    return f"-Wall -Wextra {'-Werror ' if gxx() == STRICT_GXX else ''}-Wno-unknown-pragmas -Wno-psabi"


def compiler_trouble() -> str | None:
    """Why the C++ compiler cannot build anything of ours."""
    if shutil.which(CXX.split()[0]) is None:
        return f"no C++ compiler ({CXX}) was found"
    version = gxx()
    if version is not None and version < OLDEST_GXX:
        return f"{CXX} is version {version}; {OLDEST_GXX} or later is needed (CXX=... names another)"
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))
    for candidate in (f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), *map(str, usual)):
        if candidate and Path(candidate).exists():
            return candidate
    return None


def cuda_libraries(nvcc: str) -> str:
    """-L for the toolkit's folders of libraries, of which each way of installing it has its own: nvcc knows them."""
    text = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    line = next((line for line in text.splitlines() if "LIBRARIES=" in line), "")
    return " ".join(dict.fromkeys(re.findall(r'-L[^"\s]+', line)))


def architectures() -> list[str]:
    """compute_/sm_ numbers. compute_90 also as PTX, from which the driver compiles for every GPU after Hopper."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        return [a.replace(".", "") for a in re.split(r"[;, ]+", wanted) if a and a[0].isdigit()]
    return ["80", "90a", "90+PTX"]


def gencode(archs: list[str], source: Path) -> str:
    flags = []
    # Hopper's own sources hold launchers that the bindings name, whichever GPUs the others are for.
    for arch in ["90a"] if source.stem.endswith("_sm90") else archs:
        number = arch.removesuffix("+PTX")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
        else:  # `-arch=sm_90a` would also compile plain compute_90, which rejects wgmma
            flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
    return " ".join(flags)


def plan() -> tuple[dict[str, str | None], list[str]]:
    """What to build, and why the rest is left out: ({kind: nvcc path or None}, remarks)."""
    wish = os.environ.get("PYKERNELS_BUILD", "auto").replace(" ", "").lower() or "auto"
    if wish not in ("auto", "all", "none"):
        unknown = set(wish.split(",")) - set(KINDS)
        if unknown:
            raise SystemExit(
                f"PYKERNELS_BUILD={wish}: unknown {sorted(unknown)}; "
                "use auto, all, none or a list of cpu, cuda, emulator"
            )
    named = set(wish.split(",")) & set(KINDS)
    wanted = {"auto": {"cpu", "cuda"}, "all": set(KINDS), "none": set()}.get(wish, named)
    reasons: dict[str, str] = {}
    torch, nvcc, trouble = torch_here(), find_nvcc(), compiler_trouble()
    if sys.platform != "linux" or platform.machine() != "x86_64":
        reasons = dict.fromkeys(
            KINDS, f"the extensions are built on Linux x86-64 only, this is {sys.platform} {platform.machine()}"
        )
    if trouble:
        for kind in KINDS:
            reasons.setdefault(kind, trouble)
    if torch is None:
        reasons.setdefault("cpu", "torch was not found: install it first (outside of pip: build without isolation)")
    elif tuple(int(part) for part in torch[0].split(".")[:2]) < OLDEST_TORCH:
        reasons.setdefault("cpu", f"torch {torch[0]} is too old: {'.'.join(map(str, OLDEST_TORCH))} or later is needed")
    if nvcc is None:
        reasons.setdefault("cuda", "no nvcc was found (set CUDA_HOME)")
    for kind in sorted(named & reasons.keys()):
        raise SystemExit(f"PYKERNELS_BUILD={wish}: {kind} cannot be built: {reasons[kind]}")
    sources = {kind: any((CSRC / ("cpu" if kind == "cpu" else "cuda")).glob("*.c*")) for kind in KINDS}
    built = {
        kind: nvcc if kind == "cuda" else None
        for kind in KINDS
        if kind in wanted and kind not in reasons and sources[kind]
    }
    return built, [
        f"pykernels: not building {kind}: {reasons[kind]}" for kind in KINDS if kind in wanted and kind in reasons
    ]


class Ninja:
    """The text of a build.ninja, target by target."""

    def __init__(self, work: Path, nvcc: str | None) -> None:
        self.work = work
        self.python = f"-I{pybind11_include()} -I{sysconfig.get_path('include')}"
        self.lines = [
            f"rule cxx\n command = {CXX} -MMD -MF $out.d $flags -c $in -o $out\n depfile = $out.d\n deps = gcc",
            f"rule link\n command = {CXX} -shared $in -o $out $libs",
        ]
        if nvcc:  # C75xx: wgmma serialised or patched by ptxas, which calls it information and lets --Werror pass
            self.lines.append(
                f"rule nvcc\n command = {nvcc} -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 "
                "&& ! grep C75 $out.log || { cat $out.log; rm -f $out; exit 1; }\n depfile = $out.d\n deps = gcc"
            )

    def unit(self, module: str, rule: str, source: Path, flags: str) -> str:
        target = f"{module}/{source.name}.o"
        self.lines.append(f"build {target}: {rule} {source}\n flags = {flags}")
        return target

    def merged(self, module: str, name: str, sources: list[Path], flags: str) -> str:
        """One unit of several sources: the headers of torch or pybind11 are most of what each costs to compile."""
        made = self.work / module / f"{name}.cpp"
        made.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f'#include "{source}"\n' for source in sources)
        if not made.exists() or made.read_text() != text:
            made.write_text(text)
        return self.unit(module, "cxx", made, flags)

    def module(self, target: Path, objects: list[str], libs: str) -> None:
        self.lines.append(f"build {target}: link {' '.join(objects)}\n libs = {libs}")

    def cpu(self, target: Path) -> None:
        version, include_paths, lib, abi_flag = torch_here()
        includes = " ".join(f"-isystem {p}" for p in include_paths)
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={abi_flag}"
        version = f'-DPK_TORCH_VERSION=\\"{version}\\" -DPK_MODULE=_cpu_ext'
        base = f"{COMMON} {CPU} {warnings()} {includes} {abi} {version} {self.python}"
        objects, rooms = [], {}
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if isa := ISA_FLAGS.get(source.stem.rsplit("_", 1)[-1]):
                objects.append(self.unit("cpu", "cxx", source, f"{base} {isa}"))
            else:
                room = next((r for r in ROOMS if source.stem.startswith(r)), "common")
                rooms.setdefault(room, []).append(source)
        objects += [self.merged("cpu", room, sources, base) for room, sources in rooms.items()]
        self.module(target, objects, f"-fopenmp -L{lib} -lc10 -ltorch_cpu -ltorch -Wl,--as-needed -Wl,-rpath,{lib} -s")

    def bindings(self, kind: str, flags: str) -> str:
        folders = ("cuda", "emulator") if kind == "emulator" else ("cuda",)
        sources = [s for f in folders for s in sorted((CSRC / f).glob("*bindings.cpp"))]
        return self.merged(kind, "bindings", sources, flags)

    def emulator(self, target: Path) -> None:
        base = f"{COMMON} {warnings()}"
        kernels = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "emulator").glob("*.cu"))]
        # The runtime is linked first: where a template is in both, the copy without hooks must be the one that stays.
        runtime = [s for s in sorted((CSRC / "emulator").glob("*.cpp")) if not s.name.endswith("bindings.cpp")]
        objects = [self.unit("emulator", "cxx", s, f"{base} -O2 -g1 -DEMU_HOOKS -DPK_EMULATOR") for s in runtime]
        objects += [self.unit("emulator", "cxx", s, f"{base} {CHECKED} -DPK_EMULATOR") for s in kernels]
        objects.append(self.bindings("emulator", f"{base} -O1 -DPK_EMULATOR -DPK_MODULE=_emulator_ext {self.python}"))
        self.module(target, objects, "-ldl")

    def cuda(self, target: Path, nvcc: str) -> None:
        archs = architectures()
        base = f"-std=c++20 -O3 -lineinfo -Xptxas=-v -I{CSRC} {'--Werror all-warnings ' if gxx() == STRICT_GXX else ''}"
        base += "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
        objects = []
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            objects.append(self.unit("cuda", "nvcc", source, f"{base} --threads 2 {gencode(archs, source)}"))
        listed = ",".join(archs)
        flags = f'{COMMON} {warnings()} -O1 -DPK_MODULE=_cuda_ext -DPK_ARCHS=\\"{listed}\\" {self.python}'
        objects.append(self.bindings("cuda", flags))
        self.module(target, objects, f"{cuda_libraries(nvcc)} -lcudart_static -ldl -lrt -lpthread")


class NinjaBuild(build_ext):
    def build_extensions(self) -> None:
        built, _ = PLAN
        work = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.version_info.major}{sys.version_info.minor}"
        work.mkdir(parents=True, exist_ok=True)
        ninja = Ninja(work, built.get("cuda"))
        made = []  # (extension, its module); an Extension is not hashable
        for extension in self.extensions:
            kind = extension.name.removeprefix("pykernels._").removesuffix("_ext")
            made.append((extension, work / Path(self.get_ext_fullpath(extension.name)).name))
            getattr(ninja, kind)(made[-1][1], *([built["cuda"]] if kind == "cuda" else []))
        (work / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
        command = [self.ninja(), "-C", str(work), *(["-j", jobs] if (jobs := os.environ.get("MAX_JOBS")) else [])]
        subprocess.check_call(command)
        for extension, so in made:
            destination = Path(self.get_ext_fullpath(extension.name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(so, destination)
            self.stamp(extension, destination.parent)

    def copy_extensions_to_source(self) -> None:
        package = Path(self.get_finalized_command("build_py").get_package_dir("pykernels"))
        for extension in self.extensions:  # a process that has the old module loaded must not see it overwritten
            for old in package.glob(f"{extension.name.rsplit('.')[-1]}.*.so"):
                old.unlink()
        super().copy_extensions_to_source()
        for extension in self.extensions:
            self.stamp(extension, package)

    @staticmethod
    def stamp(extension: Extension, folder: Path) -> None:
        """Says which torch the CPU module was built for; read before loading, another torch's is not loaded."""
        if extension.name == "pykernels._cpu_ext":
            (folder / "_cpu_ext.torch").write_text(f"{torch_here()[0]}\n")

    @staticmethod
    def ninja() -> str:
        try:
            from ninja import BIN_DIR

            return str(Path(BIN_DIR, "ninja"))
        except ImportError:
            found = shutil.which("ninja")
        if not found:
            raise SystemExit("pykernels: compiling needs ninja: pip install ninja, or leave out --no-build-isolation")
        return found


PLAN = plan()
for remark in PLAN[1]:
    print(remark, file=sys.stderr)

setup(
    # The Triton floor is the link pykernels/_triton -> ../kernels; it has no __init__.py (that would shadow the PyPI
    # package `kernels` from the repository root), so it is named here.
    packages=[*find_packages(include=["pykernels", "pykernels.*"]), "pykernels._triton"],
    ext_modules=[Extension(f"pykernels._{kind}_ext", sources=[]) for kind in PLAN[0]],
    cmdclass={"build_ext": NinjaBuild},
)
