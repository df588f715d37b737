// What kernels compiled by g++ call: the emulator's side of the CUDA built-ins and of csrc/cuda/ptx.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

struct Position {
  uint3 thread, block;
};  // the part of a CUDA thread that kernels see
struct Config {
  dim3 grid, block;
  size_t smem;
  bool cooperative;
  int cluster = 1;  // blocks along x of a cluster
};
extern Position* cur;  // the running CUDA thread
extern Config cfg;     // the launch

// A place in the source, so that threads which meet at different barriers can be told apart.
struct Site {
  const char* file;
  int line;
};
#define EMU_SITE ::emu::Site site = {__builtin_FILE(), __builtin_LINE()}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* fmt, ...);
void run(const Config&, void (*thunk)(void*), void* ctx);
int max_resident_blocks();
void yield();  // lets other threads run: every spin loop passes here

// Shared memory: a static variable's place, the dynamic part, 32-bit addresses as PTX has them.
void* static_shared(const void* key, size_t size, size_t align, Site);
void* dyn_shared();
uint32_t smem_addr(const void* p);
void* smem_ptr(uint32_t addr, size_t bytes);

// All lanes of mask meet; the last to come runs fn over every lane's payload.
enum class Op { syncwarp, shfl, vote, ldmatrix, mma, wgmma };
using WarpFn = void (*)(void** payload, uint32_t mask);
constexpr uint32_t kFull = 0xffffffffu;
void warp_collective(Op, uint32_t mask, void* payload, WarpFn, Site);
void warp_sync(uint32_t mask, Site);
enum class Shfl { idx, up, down, bfly };
uint64_t shfl(Shfl, uint32_t mask, uint64_t v, int arg, int width, Site);
uint32_t ballot(uint32_t mask, bool p, Site);
uint32_t match_any(uint32_t mask, uint64_t v, Site);
void ldmatrix(uint32_t* r, uint32_t addr, int n, bool trans, Site);
void mma16816(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16, Site);
void mma1688(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site);  // tf32

enum class BlockOp { sync, count, all, any };
int block_sync(BlockOp, int pred, Site);
void named_barrier(int id, int n, bool wait, Site);
void grid_sync(Site);

extern bool device_arithmetic;       // functions as far off as CUDA's tables of errors allow
float off_by(float x, float error);  // relative

void cp_async(uint32_t dst, const void* src, int bytes, bool pred, Site);
void cp_async_commit();
void cp_async_wait(int n);

// Atomics and fences, for the race checker: an atomic after a fence hands on what its thread had seen at the fence; a
// fence after an atomic takes what that atomic's location was handed.
enum class Scope { block, gpu };
void fence(Scope);
enum class Atomic { read_modify_write, load_acquire, store_release };
void atomic_access(const void* p, size_t n, Atomic, Site);
void made_progress();  // memory changed: a spin loop may end now

template <class T>
uint64_t bits(T v) {
  static_assert(sizeof(T) <= 8);
  uint64_t u = 0;
  memcpy(&u, &v, sizeof(T));
  return u;
}
template <class T>
T unbits(uint64_t u) {
  T v;
  memcpy(&v, &u, sizeof(T));
  return v;
}

// Tag is a lambda's type, so there is one key a variable and template instantiation.
template <class T, class Tag>
T& shared_var(Tag, Site s) {
  static const char key = 0;
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T), s));
}

// Of the launchers: a kernel whose pointers are all inside of structs needs a DeviceGuard around its launch.
extern int guards;
template <class... A>
void check_guarded() {
  if (guards == 0 && !(std::is_pointer_v<A> || ...))
    fail("launch without a device: no argument is a pointer, and there is no DeviceGuard");
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const Config& c, A... args) {
  check_guarded<A...>();
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, {static_cast<P>(args)...}};
  run(
      c,
      [](void* p) {
        auto* x = static_cast<Call*>(p);
        std::apply(x->kernel, x->args);
      },
      &call);
}

}  // namespace emu
