// Work shared out over torch's own threads, or over plain threads where torch's OpenMP runtime is not to be found.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "tiles.h"

namespace PCS_ISA {

// Two functions of the OpenMP runtime that torch has loaded: sharing its pool avoids two sets of spinning threads.
using gomp_parallel_fn = void (*)(void (*)(void*), void*, unsigned, unsigned);
using thread_number_fn = int (*)();
inline gomp_parallel_fn gomp_parallel = nullptr;
inline thread_number_fn thread_number = nullptr;

// The tasks of one parallel_for. Every thread starts on its own contiguous share, the same in each call, so that
// memory it wrote stays in its cache; who is done helps the others.
template <class Body>
class Job {
 public:
  Job(const Body& body, int64_t tasks, int threads, bool backwards)
      : body_(body), shares_(threads), backwards_(backwards) {
    for (int i = 0; i < threads; i++) {
      shares_[i].first = tasks * i / threads;
      shares_[i].count = tasks * (i + 1) / threads - shares_[i].first;
    }
  }
  void run(int thread) {
    const int threads = int(shares_.size());
    for (int i = 0; i < threads; i++) {
      Share& share = shares_[(thread + i) % threads];
      for (int64_t done; !failed && (done = share.next.fetch_add(1)) < share.count;) {
        try {
          body_(share.first + (backwards_ ? share.count - 1 - done : done));
        } catch (...) {  // no exception may leave a thread of the pool; out of memory is all there can be
          failed = true;
        }
      }
    }
#if defined(__AMX_BF16__)
    release_tiles();
#endif
  }
  static void enter(void* self) { static_cast<Job*>(self)->run(thread_number()); }
  std::atomic<bool> failed{false};

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t first = 0, count = 0;
  };
  const Body& body_;
  std::vector<Share> shares_;
  const bool backwards_;
};

// Calls body(task) once for every task in [0, tasks); which thread runs it decides nothing. A second pass over the
// same memory goes backwards: what the first pass touched last is still in the cache.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body, bool backwards = false) {
  threads = int(std::min<int64_t>(std::max(threads, 1), tasks));
  if (threads <= 0) return;
  Job<Body> job(body, tasks, threads, backwards);
  if (threads == 1) {
    job.run(0);
  } else if (gomp_parallel) {
    gomp_parallel(&Job<Body>::enter, &job, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back([&job, i] { job.run(i); });
    job.run(0);
    for (auto& t : others) t.join();
  }
  if (job.failed) throw std::bad_alloc();
}

// Memory aligned to cache lines, freed with its owner.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace PCS_ISA
