// What g++ -fsanitize=thread,alignment,bounds,... calls from the kernels.  The module is linked without libtsan and
// libubsan: these definitions answer instead.
#include "checker.h"

#if defined(EMU_HOOKS)

namespace emu {

namespace {

// A loop on plain loads never yields by itself: let the others run now and then, and end it when no thread writes.
void count_idle_read() {
  if (++idle_reads & 0xffff) return;
  if (idle_reads >= options.max_idle_reads)
    fail("livelock: %u reads while no thread wrote, waited or exited", idle_reads);
  yield();
}

void on_access(void* p, size_t n, bool write, bool aligned, const void* pc) {
  if (!cur) return;
  Thread& t = *self();
  const uintptr_t a = reinterpret_cast<uintptr_t>(p);
  checked_access(t, a, n, write ? Access::write : Access::read, aligned, origin_of_pc(pc));
  if (write)
    idle_reads = 0;
  else
    count_idle_read();
}

void on_entry(const char* frame) {
  if (!cur) return;
  const Thread& t = *self();
  const ptrdiff_t left = frame - t.stack;
  if (left < static_cast<ptrdiff_t>(kStackMargin))
    fail("stack overflow: over %zu KiB of local arrays and call frames", (kStack - kStackMargin) / 1024);
}

struct Location {
  const char* file;
  unsigned line, column;
};
void undefined(const char* what, const Location* l) {
  if (cur) fail("%s at %s", what, name_site({l->file, static_cast<int>(l->line)}).c_str());
}

}  // namespace

}  // namespace emu

#define PC __builtin_return_address(0)
#define HOOKS(n)                                                                     \
  void __tsan_read##n(void* p) { emu::on_access(p, n, false, true, PC); }            \
  void __tsan_write##n(void* p) { emu::on_access(p, n, true, true, PC); }            \
  void __tsan_unaligned_read##n(void* p) { emu::on_access(p, n, false, false, PC); } \
  void __tsan_unaligned_write##n(void* p) { emu::on_access(p, n, true, false, PC); }
#define UNDEFINED(name, what, ...) \
  void __ubsan_handle_##name(emu::Location* l __VA_OPT__(, ) __VA_ARGS__) { emu::undefined(what, l); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { emu::on_access(p, n, false, false, PC); }
void __tsan_write_range(void* p, size_t n) { emu::on_access(p, n, true, false, PC); }
void __tsan_func_entry(void*) { emu::on_entry(static_cast<const char*>(__builtin_frame_address(0))); }
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
char __tsan_atomic8_load(const volatile char* p, int) { return *p; }  // guards of static locals
void __tsan_init() { emu::locate_module(PC); }

UNDEFINED(type_mismatch_v1, "misaligned or null access", void*)
UNDEFINED(out_of_bounds, "array index out of bounds", void*)
UNDEFINED(shift_out_of_bounds, "shift out of bounds", void*, void*)
UNDEFINED(add_overflow, "signed integer overflow", void*, void*)
UNDEFINED(sub_overflow, "signed integer overflow", void*, void*)
UNDEFINED(mul_overflow, "signed integer overflow", void*, void*)
UNDEFINED(negate_overflow, "signed integer overflow", void*)
UNDEFINED(divrem_overflow, "division by zero or overflow", void*, void*)
}

#endif
