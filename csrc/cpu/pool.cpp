#include "pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <unordered_map>

#include "scratch.h"
#include "system_memory.h"

namespace pk {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kPatience = 5.0;  // seconds that a block waits for its next use
constexpr auto kLook = std::chrono::milliseconds(250);

// Sizes come in steps of an eighth of their power of two, so a block serves results that differ a little.
size_t rounded(size_t bytes) {
  const size_t step = std::max(std::bit_floor(bytes) / 8, size_t{64} << 10);
  return (bytes + step - 1) / step * step;
}

void* map(size_t bytes) {
  const size_t all = bytes + kHugePage;  // a margin, so that a boundary is inside; what is around the block goes back
  char* const start =
      static_cast<char*>(mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) return nullptr;
  char* const block = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) + kHugePage - 1) & ~(kHugePage - 1));
  if (block != start) munmap(start, block - start);
  munmap(block + bytes, start + all - (block + bytes));
  madvise(block, bytes, MADV_HUGEPAGE);  // a wish: failure is fine
  return block;
}

struct Idle {
  void* data;
  Clock::time_point since;
};

struct Used {
  size_t bytes;
  uint64_t process;  // that mapped it: forks are counted
  bool reusable;
};

class Pool {
 public:
  void* take(size_t asked, bool zeroed) {
    const size_t bytes = rounded(asked);
    if (!zeroed) {
      std::lock_guard lock(mutex_);
      const auto found = idle_.lower_bound(bytes);
      if (found != idle_.end() && found->first <= bytes + bytes / 4) {
        void* const data = found->second.data;
        used_.emplace(data, Used{found->first, process_, true});
        idle_bytes_ -= found->first;
        used_bytes_ += found->first;
        idle_.erase(found);
        ++reused_;
        return data;
      }
    }
    void* data = map(bytes);
    if (!data) {  // no room: what lies idle may be it
      empty();
      data = map(bytes);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data, "pykernels: could not map ", bytes, " bytes for a result");
    std::lock_guard lock(mutex_);
    used_.emplace(data, Used{bytes, process_, !zeroed});
    used_bytes_ += bytes;
    ++mapped_;
    return data;
  }

  void give(void* data) {
    std::lock_guard lock(mutex_);
    const auto found = used_.find(data);
    const Used block = found->second;
    used_.erase(found);
    used_bytes_ -= block.bytes;
    // A parent's pages would be copied one by one when written: worse than fresh ones.
    const int64_t bytes = block.bytes;
    if (!block.reusable || block.process != process_ || bytes > bound()) {
      munmap(data, block.bytes);
      ++returned_;
      if (bytes > shortage_ && bytes <= max_bytes_ && !watching_) watch();  // it sees when the shortage is over
      return;
    }
    // First among equals, so that the block used last, whose lines are still in the cache, goes out first.
    idle_.emplace_hint(idle_.lower_bound(block.bytes), block.bytes, Idle{data, Clock::now()});
    idle_bytes_ += block.bytes;
    while (idle_bytes_ > bound()) release(oldest());
    if (!watching_) watch();
  }

  void empty() {
    std::lock_guard lock(mutex_);
    while (!idle_.empty()) release(idle_.begin());
  }

  void trim(double seconds, const SystemMemory& memory) {
    std::lock_guard lock(mutex_);
    if (memory.limit) shortage_ = (memory.available + idle_bytes_) / 4;
    const auto last = Clock::now() - std::chrono::duration<double>(seconds);
    while (!idle_.empty()) {
      const auto block = oldest();
      if (block->second.since > last && idle_bytes_ <= bound()) break;
      release(block);
    }
  }

  void set_max_bytes(int64_t bytes) {
    const SystemMemory memory = system_memory();
    std::lock_guard lock(mutex_);
    max_bytes_ = bytes >= 0 ? bytes : memory.limit / 8;
    shortage_ = memory.limit ? memory.available / 4 : int64_t{256} << 20;
    while (!idle_.empty() && idle_bytes_ > bound()) release(oldest());
  }

  PoolState state() {
    std::lock_guard lock(mutex_);
    return {max_bytes_, idle_bytes_, std::ssize(idle_), used_bytes_, std::ssize(used_), reused_, mapped_, returned_};
  }

  bool enabled() const { return max_bytes_ > 0; }

  // ---- fork: the lock is held across it, so the child sees whole structures

  void before_fork() { mutex_.lock(); }
  void in_parent() { mutex_.unlock(); }
  void in_child() {
    for (const auto& [bytes, block] : idle_) munmap(block.data, bytes);
    idle_.clear();
    idle_bytes_ = 0;
    ++process_;
    watching_ = false;  // the thread is the parent's
    mutex_.unlock();
  }

 private:
  using Blocks = std::multimap<size_t, Idle>;

  int64_t bound() const { return std::min<int64_t>(max_bytes_, shortage_); }

  Blocks::iterator oldest() {
    return std::min_element(idle_.begin(), idle_.end(),
                            [](const auto& a, const auto& b) { return a.second.since < b.second.since; });
  }

  void release(Blocks::iterator block) {
    munmap(block->second.data, block->first);
    idle_bytes_ -= block->first;
    idle_.erase(block);
    ++returned_;
  }

  // Starts the thread that gives back what nobody asks for; it ends when nothing is left. Where no thread can be had,
  // blocks wait for the next bound that is hit.
  void watch() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    try {
      std::thread([this] {
        pthread_setname_np(pthread_self(), "pykernels-pool");
        do {
          std::this_thread::sleep_for(kLook);
          trim(kPatience, system_memory());  // reads files: not under the lock
        } while (!done());
      }).detach();
      watching_ = true;
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  bool done() {
    std::lock_guard lock(mutex_);
    if (idle_.empty()) watching_ = false;
    return idle_.empty();
  }

  std::mutex mutex_;
  Blocks idle_;  // by size
  std::unordered_map<void*, Used> used_;
  std::atomic<int64_t> max_bytes_ = 0;
  int64_t shortage_ = 0;  // bound by what was available at the last look
  int64_t idle_bytes_ = 0, used_bytes_ = 0, reused_ = 0, mapped_ = 0, returned_ = 0;
  uint64_t process_ = 0;
  bool watching_ = false;
};

Pool& pool() {
  static Pool* const made = [] {
    Pool* const p = new Pool;  // never destroyed: tensors are freed after static objects are
    p->set_max_bytes(-1);
    return p;
  }();
  static const int registered =
      pthread_atfork([] { made->before_fork(); }, [] { made->in_parent(); }, [] { made->in_child(); });
  static_cast<void>(registered);
  return *made;
}

void release_storage(void* data) {
  if (!data) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  pool().give(data);
}

struct PoolAllocator final : c10::Allocator {
  explicit PoolAllocator(bool zeroed) : zeroed(zeroed) {}
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kPooled || !(zeroed || pool().enabled())) return c10::GetCPUAllocator()->allocate(bytes);
    void* const data = pool().take(bytes, zeroed);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release_storage, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  const bool zeroed;
};

}  // namespace

c10::Allocator* pool_allocator() {
  static PoolAllocator* const allocator = new PoolAllocator(false);
  return allocator;
}

c10::Allocator* zeroed_allocator() {
  static PoolAllocator* const allocator = new PoolAllocator(true);
  return allocator;
}

bool pool_enabled() { return pool().enabled(); }
PoolState pool_state() { return pool().state(); }
void pool_set_max_bytes(int64_t bytes) { pool().set_max_bytes(bytes); }
void pool_empty() { pool().empty(); }
void pool_trim(double idle_seconds, const std::string& proc, const std::string& cgroup) {
  pool().trim(idle_seconds, system_memory(proc, cgroup));
}

}  // namespace pk
