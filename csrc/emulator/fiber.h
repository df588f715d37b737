// Context switch between fibers: hand-written for x86-64 and aarch64, ucontext elsewhere (or with -DEMU_UCONTEXT).
#pragma once
#include <cstddef>
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(EMU_UCONTEXT)
#define EMU_UCONTEXT
#endif
#if defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace emu {

struct Context {
#if defined(EMU_UCONTEXT)
  ucontext_t state;
#else
  void* sp = nullptr;
#endif
  void (*entry)(void*) = nullptr;
  void* arg = nullptr;
};

// entry(arg) runs at the first switch to c and must not return.
void make_context(Context& c, char* stack, size_t size, void (*entry)(void*), void* arg);

#if defined(EMU_UCONTEXT)
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#else
extern "C" __attribute__((visibility("hidden"))) void emu_switch(void** save, void* load);
inline void switch_context(Context& from, Context& to) { emu_switch(&from.sp, to.sp); }
#endif

}  // namespace emu
