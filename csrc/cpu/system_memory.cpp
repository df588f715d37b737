#include "system_memory.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <string_view>

namespace pk {
namespace {

std::string read(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return {};
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = ::read(file, buffer, sizeof buffer)) > 0;) text.append(buffer, n);
  close(file);
  return text;
}

// The number at the start of `text`; -1: none ("max", or no such file).
int64_t number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
  int64_t value = -1;
  return std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc() ? value : -1;
}

// The number after `key`, which starts a line.
int64_t field(std::string_view text, std::string_view key) {
  for (size_t at = text.find(key); at != text.npos; at = text.find(key, at + 1)) {
    if (at == 0 || text[at - 1] == '\n') return number(text.substr(at + key.size()));
  }
  return -1;
}

struct Names {
  const char *limit, *usage, *droppable;
};
constexpr Names kVersion1{"/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file "};
constexpr Names kVersion2{"/memory.max", "/memory.current", "inactive_file "};

// Narrows `found` to a group and all above it: a limit anywhere on the way up holds. Inside a container the path may
// name folders that are not mounted there; they have no files and are passed over.
void narrow(SystemMemory& found, const std::string& root, std::string path, const Names& names) {
  for (;; path.resize(path.rfind('/'))) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    const std::string folder = root + path;
    const int64_t limit = number(read(folder + names.limit)), usage = number(read(folder + names.usage));
    if (limit >= 0 && usage >= 0) {
      const int64_t droppable = std::max<int64_t>(0, field(read(folder + "/memory.stat"), names.droppable));
      found.limit = std::min(found.limit, limit);
      found.available = std::min(found.available, std::max<int64_t>(0, limit - usage) + droppable);
    }
    if (path.empty()) return;
  }
}

}  // namespace

SystemMemory system_memory(const std::string& proc, const std::string& cgroup) {
  const std::string machine = read(proc + "/meminfo"), groups = read(proc + "/self/cgroup");
  const int64_t total = field(machine, "MemTotal:"), available = field(machine, "MemAvailable:");
  if (total < 0 || available < 0) return {};
  SystemMemory found{total << 10, available << 10};
  for (size_t begin = 0; begin < groups.size();) {  // number:controllers:path
    const size_t end = std::min(groups.find('\n', begin), groups.size());
    const std::string line = groups.substr(begin, end - begin);
    begin = end + 1;
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    std::string controllers = line.substr(first, second - first + 1);
    controllers.front() = controllers.back() = ',';
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") {
      narrow(found, cgroup, path, kVersion2);
    } else if (controllers.find(",memory,") != controllers.npos) {
      narrow(found, cgroup + "/memory", path, kVersion1);
    }
  }
  return found;
}

}  // namespace pk
