// Where a fiber left off: saved and gone on from by simt_switch.
#pragma once
#include <ucontext.h>

#include <cstddef>

namespace simt {

constexpr size_t kStackBytes = 192 << 10;

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
// Saves the caller's registers and stack pointer, and goes on where `to` was saved. (swapcontext costs two system
// calls each time, and a CTA switches thousands of times.)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void simt_switch(Context* from, const Context* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(entry);  // where `ret` goes; six registers below it
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 6;
}
#else
struct Context {
  ucontext_t saved;
};
inline void simt_switch(Context* from, const Context* to) { swapcontext(&from->saved, &to->saved); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = kStackBytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
#endif

}  // namespace simt
