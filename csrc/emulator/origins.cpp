// Names for places in the kernels' source: sites (file and line known) and return addresses (asked of addr2line).
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>

#include "checker.h"

namespace emu {

namespace {

constexpr uint32_t kIsSite = 0x80000000u;
std::vector<Site> sites;
uintptr_t module_begin = 0, module_end = 0;
const char* module_path = "";

// addr2line prints one "file:line" a frame, the innermost inlined first.
std::vector<std::string> frames(uint32_t offset) {
  char command[1200], line[1024];
  snprintf(command, sizeof command, "addr2line -i -e '%s' %x 2>/dev/null", module_path, offset);
  std::vector<std::string> out;
  FILE* f = popen(command, "r");
  if (!f) return out;
  while (fgets(line, sizeof line, f)) {
    std::string s(line);
    s.erase(s.find_first_of("\n ("));  // also "(discriminator n)"
    const size_t root = s.rfind("csrc/");
    const std::string shown = root == std::string::npos ? s : s.substr(root);
    if (shown.rfind("csrc/emulator/", 0) == 0 && shown.find(".h:") != std::string::npos) continue;  // our own headers
    if (shown[0] != '?') out.push_back(shown);
  }
  pclose(f);
  return out;
}

}  // namespace

uint32_t origin_of(Site s) {
  for (size_t i = sites.size(); i--;)
    if (sites[i].line == s.line && sites[i].file == s.file) return static_cast<uint32_t>(i) | kIsSite;
  sites.push_back(s);
  return static_cast<uint32_t>(sites.size() - 1) | kIsSite;
}

uint32_t origin_of_pc(const void* pc) {  // the byte before the return address belongs to the call
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - module_begin - 1);
}

std::string name_origin(uint32_t origin) {
  if (origin & kIsSite) return name_site(sites[origin & ~kIsSite]);
  const std::vector<std::string> at = frames(origin);
  if (at.empty()) {
    char s[64];
    snprintf(s, sizeof s, "code offset 0x%x (addr2line, of binutils, names the line)", origin);
    return s;
  }
  return at.size() == 1 ? at[0] : at[0] + " (inlined at " + at.back() + ")";
}

bool in_module(uintptr_t a) { return a >= module_begin && a < module_end; }

void locate_module(const void* pc) {
  if (module_end) return;
  Dl_info info;
  if (!dladdr(pc, &info)) return;
  module_begin = reinterpret_cast<uintptr_t>(info.dli_fbase);
  module_path = info.dli_fname;
  dl_iterate_phdr(
      [](dl_phdr_info* i, size_t, void*) {
        for (int k = 0; k < i->dlpi_phnum; ++k)
          if (i->dlpi_addr == module_begin && i->dlpi_phdr[k].p_type == PT_LOAD)
            module_end = std::max(
                module_end, static_cast<uintptr_t>(i->dlpi_addr + i->dlpi_phdr[k].p_vaddr + i->dlpi_phdr[k].p_memsz));
        return 0;
      },
      nullptr);
}

}  // namespace emu
