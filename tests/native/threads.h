// The block of threads of csrc/cuda/device.cuh with a host thread for each thread of the block, and
// several blocks at once, so that ThreadSanitizer sees every access that the kernels leave
// unordered.
//
// Team stands for shared memory, with one place for each function that declares a shared variable.
// A barrier is a barrier of all threads; a warp's shuffle is one of the warp's threads.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <deque>
#include <thread>
#include <vector>

#include "../../csrc/cuda/kernels.cuh"

namespace threads {

constexpr int kWarp = 32;

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

template <int kSize>
struct Team {
  static_assert(kSize == 2 * kWarp);
  static constexpr int kBytes = 4096;
  struct alignas(16) Place {
    unsigned char bytes[kBytes];
  };
  Barrier all{kSize};
  std::array<Barrier, kSize / kWarp> warps{Barrier(kWarp), Barrier(kWarp)};
  std::vector<Place> shared = std::vector<Place>(64);
};

inline int next_place() {
  static std::atomic<int> places{0};
  return places++;
}

template <int kSize>
class Block {
 public:
  static constexpr int kThreads = kSize;

  Block(unsigned index, int thread, Team<kSize>& team)
      : index_(index), thread_(thread), team_(team) {}

  unsigned index() const { return index_; }
  void barrier() { team_.all.wait(); }

  template <class F>
  void each(F&& f) {
    f(thread_);
  }

  template <class F>
  void once(F&& f) {
    if (thread_ == 0) f();
  }

  template <class F>
  auto broadcast(F&& f) {
    auto& value = *shared<decltype(f()), F>();
    if (thread_ == 0) value = f();
    barrier();
    return value;
  }

  template <class F, class ShareAt>
  auto softmax(F&& f, ShareAt&& share_at) {
    const auto found = f(thread_);
    float origin = found.origin;
    for (float other : exchange(origin)) origin = fmaxf(origin, other);
    auto* origins = shared<float, F>();
    if (thread_ % kWarp == 0) origins[thread_ / kWarp] = origin;
    barrier();
    for (int warp = 0; warp < kSize / kWarp; ++warp) origin = fmaxf(origin, origins[warp]);
    auto share = add_lanes(share_at(found, origin));
    auto* shares = shared<decltype(share), ShareAt>();
    if (thread_ % kWarp == 0) shares[thread_ / kWarp] = share;
    barrier();
    if (thread_ == 0)
      for (int warp = 1; warp < kSize / kWarp; ++warp) share = share + shares[warp];
    return share;
  }

  template <class Sum, class Term, class Store>
  void sums(int64_t n, Term&& term, Store&& store) {
    for (int64_t i = thread_ / kWarp; i < n; i += kSize / kWarp) {
      const Sum sum = add_lanes(term(i, thread_ % kWarp, kWarp));
      if (thread_ % kWarp == 0) store(i, sum);
    }
    barrier();
  }

  template <class Term>
  double total(Term&& term) {
    const double sum = add_lanes(term(thread_));
    auto* sums = shared<double, Term>();
    if (thread_ % kWarp == 0) sums[thread_ / kWarp] = sum;
    barrier();
    double all = 0;
    for (int warp = 0; warp < kSize / kWarp; ++warp) all += sums[warp];
    barrier();
    return all;
  }

  // acq_rel stands for the two __threadfence() around the device's atomicAdd.
  bool arrive(unsigned* counter, int64_t count) {
    barrier();
    return broadcast([&] {
      const bool last =
          std::atomic_ref(*counter).fetch_add(1, std::memory_order_acq_rel) == count - 1;
      if (last) *counter = 0;
      return last;
    });
  }

 private:
  // The place in shared memory that belongs to the function F: the same one at every call.
  template <class T, class F>
  T* shared() {
    static const int place = next_place();
    static_assert(sizeof(T) * kSize <= Team<kSize>::kBytes);
    return reinterpret_cast<T*>(team_.shared.at(size_t(place)).bytes);
  }

  // Returns the values of all lanes of this thread's warp.
  template <class T>
  std::array<T, kWarp> exchange(const T& value) {
    const int warp = thread_ / kWarp;
    struct Lanes {
      T values[kWarp];
    };
    auto* lanes = shared<T, Lanes[kSize / kWarp]>() + warp * kWarp;
    lanes[thread_ % kWarp] = value;
    team_.warps[size_t(warp)].wait();
    std::array<T, kWarp> all;
    std::copy(lanes, lanes + kWarp, all.begin());
    team_.warps[size_t(warp)].wait();
    return all;
  }

  template <class Sum>
  Sum add_lanes(const Sum& sum) {  // in the order in which a warp's shuffles add
    auto lanes = exchange(sum);
    for (int half = kWarp / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane)
        lanes[size_t(lane)] = lanes[size_t(lane)] + lanes[size_t(lane + half)];
    return lanes[0];
  }

  unsigned index_;
  int thread_;
  Team<kSize>& team_;
};

// Runs a kernel's body for `blocks` blocks, `beside` of them at a time.
template <int kSize, class Body>
void launch(int64_t blocks, int beside, const Body& body) {
  std::deque<Team<kSize>> teams(static_cast<size_t>(beside));
  std::vector<std::thread> all;
  for (int t = 0; t < beside; ++t)
    for (int thread = 0; thread < kSize; ++thread)
      all.emplace_back([&, t, thread] {
        for (int64_t index = t; index < blocks; index += beside) {
          Block<kSize> block(unsigned(index), thread, teams[size_t(t)]);
          body(block);
          block.barrier();  // the next block reuses the shared memory
        }
      });
  for (auto& thread : all) thread.join();
}

}  // namespace threads
