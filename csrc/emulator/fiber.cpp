#include "fiber.h"

#include <cstdint>

// emu_switch pushes the callee-saved registers, exchanges stack pointers and pops them again.  emu_boot is where a new
// fiber's first switch "returns" to: it calls boot(context) with an empty frame pointer, where back-traces end.
#if defined(EMU_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
.globl emu_boot
.hidden emu_boot
.type emu_boot,@function
emu_boot:
  movq %r12, %rdi
  xorl %ebp, %ebp
  call *%rbx
  ud2
.size emu_boot, .-emu_boot
)");
#else
asm(R"(
.text
.p2align 4
.globl emu_switch
.hidden emu_switch
.type emu_switch,%function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch, .-emu_switch
.globl emu_boot
.hidden emu_boot
.type emu_boot,%function
emu_boot:
  mov x0, x20
  blr x19
  brk #1
.size emu_boot, .-emu_boot
)");
#endif

namespace emu {
namespace {

[[noreturn]] void boot(Context* c) {
  c->entry(c->arg);
  __builtin_trap();
}

}  // namespace

#if defined(EMU_UCONTEXT)

void make_context(Context& c, char* stack, size_t size, void (*entry)(void*), void* arg) {
  c.entry = entry, c.arg = arg;
  getcontext(&c.state);
  c.state.uc_stack.ss_sp = stack, c.state.uc_stack.ss_size = size, c.state.uc_link = nullptr;
  // makecontext passes ints only: the pointer goes in two halves
  const auto start = +[](unsigned low, unsigned high) {
    boot(reinterpret_cast<Context*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32));
  };
  const uint64_t p = reinterpret_cast<uintptr_t>(&c);
  makecontext(&c.state, reinterpret_cast<void (*)()>(start), 2, static_cast<unsigned>(p),
              static_cast<unsigned>(p >> 32));
}

#else

extern "C" void emu_boot();

void make_context(Context& c, char* stack, size_t size, void (*entry)(void*), void* arg) {
  c.entry = entry, c.arg = arg;
  void** sp = reinterpret_cast<void**>(stack + size);
#if defined(__x86_64__)
  *--sp = nullptr;  // two words keep the stack 16-byte aligned at emu_boot's call
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(emu_boot);
  *--sp = nullptr;                         // rbp
  *--sp = reinterpret_cast<void*>(&boot);  // rbx
  *--sp = &c;                              // r12
  for (int i = 0; i < 3; ++i) *--sp = nullptr;
#else
  sp -= 20;
  for (int i = 0; i < 20; ++i) sp[i] = nullptr;
  sp[0] = reinterpret_cast<void*>(&boot);      // x19
  sp[1] = &c;                                  // x20
  sp[11] = reinterpret_cast<void*>(emu_boot);  // x30
#endif
  c.sp = sp;
}

#endif

}  // namespace emu
