#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace di4c::cpu {
namespace {

constexpr size_t kAlign = 64;

struct Job {
  Task task;
  void* context;
  int64_t tasks;
  char* scratch;
  size_t stride;
  std::atomic<int64_t> next{0};

  void work(int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      task(context, i, scratch + static_cast<size_t>(worker) * stride);
  }
};

class Pool {
 public:
  std::mutex busy;  // held by the caller whose job runs

  // Worker 0 is the caller.
  void run(Job& job, int workers) {
    {
      std::lock_guard lock(mutex_);
      grow(workers - 1);
      helpers_ = std::min(workers - 1, static_cast<int>(threads_.size()));
      pending_ = helpers_;
      job_ = &job;
      ++epoch_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    job_ = nullptr;
  }

 private:
  void grow(int count) {
    try {
      while (static_cast<int>(threads_.size()) < count)
        threads_.emplace_back(&Pool::loop, this, static_cast<int>(threads_.size()), epoch_);
    } catch (const std::system_error&) {  // no more threads to be had: fewer do the same work
    }
  }

  void loop(int id, uint64_t seen) {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      if (id >= helpers_) continue;
      Job* job = job_;
      lock.unlock();
      job->work(id + 1);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  uint64_t epoch_ = 0;
  int helpers_ = 0, pending_ = 0;
};

// Never destroyed: its threads wait until the process ends. A forked child has the object but not the threads,
// and perhaps a mutex that nobody will release, so it forgets the object and makes a new one when it needs one.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (!found) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    (void)registered;
    auto fresh = std::make_unique<Pool>();
    if (current.compare_exchange_strong(found, fresh.get())) found = fresh.release();
  }
  return *found;
}

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
};

}  // namespace

void run(int64_t tasks, int threads, size_t scratch_bytes, Task task, void* context) {
  if (tasks <= 0) return;
  const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, tasks));
  const size_t stride = (scratch_bytes + kAlign - 1) / kAlign * kAlign;
  std::unique_ptr<char, AlignedDelete> scratch(
      static_cast<char*>(::operator new(stride * static_cast<size_t>(workers) + kAlign, std::align_val_t{kAlign})));
  Job job{task, context, tasks, scratch.get(), stride};
  if (workers > 1) {
    Pool& shared = pool();
    std::unique_lock busy(shared.busy, std::try_to_lock);
    if (busy.owns_lock()) return shared.run(job, workers);
  }
  job.work(0);
}

}  // namespace di4c::cpu
