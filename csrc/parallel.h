// Work shared out over torch's own threads, or over plain threads where torch's OpenMP runtime is not to be found.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace PCS_ISA {

// GOMP_parallel of the OpenMP runtime that torch has loaded: sharing its pool avoids two sets of spinning threads.
using gomp_parallel_fn = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline gomp_parallel_fn gomp_parallel = nullptr;

// Calls body(task) once for every task in [0, tasks), in no particular order; which thread runs it decides nothing.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  struct Job {
    const Body* body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    static void run(void* self) {
      Job* job = static_cast<Job*>(self);
      for (int64_t task; !job->failed && (task = job->next.fetch_add(1)) < job->tasks;) {
        try {
          (*job->body)(task);
        } catch (...) {  // an exception must not leave a thread of the pool: out of memory is all there can be
          job->failed = true;
        }
      }
    }
  } job;
  job.body = &body;
  job.tasks = tasks;
  if (threads > tasks) threads = int(tasks);
  if (threads <= 1) {
    Job::run(&job);
  } else if (gomp_parallel) {
    gomp_parallel(&Job::run, &job, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(&Job::run, &job);
    Job::run(&job);
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
