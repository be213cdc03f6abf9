// A block of GPU threads on the CPU, so that the kernels' own source is tested without a GPU.
//
// Compile: c++ -O1 -std=c++17 -shared -fPIC -x c++ csrc/two_stream_attention.cu (tests/emulation.py does).
//
// Threads are fibers that run one at a time from barrier to barrier, in ascending or descending order: a missing
// barrier gives another result in one of the two, unless a matrix product or a shuffle, which are barriers here, hides
// it (compute-sanitizer's racecheck on a GPU does not). Copies happen as late as the rules allow. Shared memory starts
// as NaN and is guarded at its end. A matrix fragment is scattered over the lanes in an order that no GPU uses, so that
// a kernel which assumed one would fail. A broken rule (a barrier that not all reach, an operand that is not aligned)
// ends the process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define MAPET_DEVICE inline
#define MAPET_KERNEL(threads) inline void
#define MAPET_CALL(type) const type
#define MAPET_SHARED(name) unsigned char* name = mapet::emulation::shared()

namespace mapet {
namespace emulation {

constexpr int WARP = 32, STACK = 1 << 16, GUARD = 256, SHARED_ALIGNMENT = 128;

struct Dimension {
  int x;
};

enum class Wait { none, warp, block, ended };

struct Copy {
  void* shared;
  const void* global;  // null: zeros
};

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on, once it has started
  bool started;
  std::vector<char> stack;
  std::vector<std::vector<Copy>> copies;  // by group; the last one is still open
  Wait wait;
  const void* published;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  int shared_size;
  ucontext_t starter;
  jmp_buf scheduler;
  std::function<void()> body;
  int current;
};

inline Block& block() {
  static Block b;
  return b;
}

inline Dimension &thread_index() {
  static Dimension d;
  return d;
}
inline Dimension &block_index() {
  static Dimension d;
  return d;
}
inline Dimension &block_size() {
  static Dimension d;
  return d;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated block %d: %s\n", block_index().x, what);
  std::abort();
}

inline unsigned char* shared() { return block().shared; }

inline void enter() {
  Block& b = block();
  b.body();
  b.fibers[b.current].wait = Wait::ended;
  _longjmp(b.scheduler, 1);
}

inline void wait(Wait what) {
  Block& b = block();
  Fiber& me = b.fibers[b.current];
  me.wait = what;
  if (_setjmp(me.place) == 0) _longjmp(b.scheduler, 1);
}

// Let the current fiber run to its next barrier. swapcontext alone would ask the kernel for each switch.
inline void resume() {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  swapcontext(&b.starter, &fiber.context);
}

// Let the fibers [lo, hi) go on if all of them have come to the same barrier.
inline bool release(int lo, int hi, Wait what) {
  Block& b = block();
  for (int i = lo; i < hi; i++)
    if (b.fibers[i].wait != what) return false;
  for (int i = lo; i < hi; i++) b.fibers[i].wait = Wait::none;
  return true;
}

// Run a warp as far as it comes without the others, which shows best whether it should have waited for them.
inline bool run_warp(int warp, bool descending) {
  Block& b = block();
  bool ran = false;
  do {
    for (int i = 0; i < WARP; i++) {
      b.current = warp * WARP + (descending ? WARP - 1 - i : i);
      if (b.fibers[b.current].wait != Wait::none) continue;
      thread_index().x = b.current;
      resume();
      ran = true;
    }
  } while (release(warp * WARP, (warp + 1) * WARP, Wait::warp));
  return ran;
}

inline void run_block(bool descending) {
  Block& b = block();
  const int threads = static_cast<int>(b.fibers.size());
  std::fill(b.memory.begin(), b.memory.end(), 0xff);
  for (Fiber& fiber : b.fibers) {
    getcontext(&fiber.context);
    fiber.stack.resize(STACK);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    fiber.started = false;
    fiber.copies.assign(1, {});
    fiber.wait = Wait::none;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool alive = true; alive;) {
    bool moved = false;
    for (int w = 0; w < threads / WARP; w++) moved |= run_warp(descending ? threads / WARP - 1 - w : w, descending);
    moved |= release(0, threads, Wait::block);
    alive = false;
    for (const Fiber& fiber : b.fibers) alive |= fiber.wait != Wait::ended;
    if (alive && !moved) fail("not every thread comes to a barrier");
  }
  for (int i = 0; i < GUARD; i++)
    if (b.shared[b.shared_size + i] != 0xff) fail("writes beyond its shared memory");
}

inline bool& descending() {
  static bool d = false;
  return d;
}

// What a launch is to fail with, as the CUDA runtime numbers its errors; 0 lets it run.
inline int& launch_error() {
  static int error = 0;
  return error;
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, int blocks, int threads, int shared_size, Arguments... arguments) {
  Block& b = block();
  b.fibers.resize(threads);
  b.memory.resize(shared_size + GUARD + SHARED_ALIGNMENT);
  const auto start = reinterpret_cast<std::size_t>(b.memory.data());
  b.shared = b.memory.data() + (SHARED_ALIGNMENT - start % SHARED_ALIGNMENT) % SHARED_ALIGNMENT;
  b.shared_size = shared_size;
  b.body = [=] { kernel(arguments...); };
  block_size().x = threads;
  for (int i = 0; i < blocks; i++) {
    block_index().x = descending() ? blocks - 1 - i : i;
    run_block(descending());
  }
}

// What each lane of this warp has published: valid until the barrier that the caller puts behind its use.
inline Fiber* publish(const void* mine) {
  Block& b = block();
  b.fibers[b.current].published = mine;
  wait(Wait::warp);
  return &b.fibers[b.current / WARP * WARP];
}

// Whether sums are as coarse as any GPU's may be (kernels/kmeans_assign/bound.py), and not those of a C++ loop.
inline bool& coarse() {
  static bool c = false;
  return c;
}

inline double cut_off(double value, double largest) {
  const double quantum = largest > 0 ? std::ldexp(1.0, std::ilogb(largest) - 23) : 1.0;
  return std::trunc(value / quantum) * quantum;
}

// total + row . column of a 16 x 16 x 16 product, four products at a time: each and the total cut off at 2^-23 of the
// largest one's power of two, and then their sum.
inline float coarse_sum(const float* row, const float* column, float total) {
  double sum = total;
  for (int first = 0; first < 16; first += 4) {
    double products[4], largest = std::fabs(sum);
    for (int k = 0; k < 4; k++) {
      products[k] = static_cast<double>(row[first + k]) * column[16 * (first + k)];
      largest = std::fmax(largest, std::fabs(products[k]));
    }
    if (!std::isfinite(largest)) return total + products[0] + products[1] + products[2] + products[3];
    sum = cut_off(sum, largest);
    for (const double product : products) sum += cut_off(product, largest);
    sum = cut_off(sum, std::fabs(sum));
  }
  return static_cast<float>(sum);
}

inline void check_operand(const void* tile) {
  if (reinterpret_cast<std::size_t>(tile) % 32 != 0) fail("a matrix operand is not aligned to 32 bytes");
}

}  // namespace emulation

#define threadIdx mapet::emulation::thread_index()
#define blockIdx mapet::emulation::block_index()
#define blockDim mapet::emulation::block_size()

// Lane l holds the elements (FACTOR * (8 l + i)) % 256, i < 8, of a row-major 16 x 16 tile.
template <class E, int FACTOR>
struct Fragment {
  static constexpr int num_elements = 8;
  E x[num_elements];
  static int position(int lane, int i) { return FACTOR * (8 * lane + i) % 256; }
};

template <class E>
using Left = Fragment<E, 37>;
template <class E>
using Right = Fragment<E, 101>;
template <class E>
struct RightTransposed : Fragment<E, 101> {};
using Sum = Fragment<float, 59>;

inline int lane_of_thread() { return emulation::block().current % emulation::WARP; }

template <class E, int FACTOR>
void load(Fragment<E, FACTOR>& fragment, const E* tile, int stride = 16) {
  emulation::check_operand(tile);
  for (int i = 0; i < 8; i++) {
    const int at = fragment.position(lane_of_thread(), i);
    fragment.x[i] = tile[at / 16 * stride + at % 16];
  }
}

template <class E>
void load(RightTransposed<E>& fragment, const E* tile, int stride = 16) {
  emulation::check_operand(tile);
  for (int i = 0; i < 8; i++) {
    const int at = fragment.position(lane_of_thread(), i);
    fragment.x[i] = tile[at % 16 * stride + at / 16];
  }
}

inline void store(float* tile, const Sum& sum) {
  emulation::check_operand(tile);
  for (int i = 0; i < 8; i++) tile[sum.position(lane_of_thread(), i)] = sum.x[i];
}

inline void clear(Sum& sum) { std::fill(sum.x, sum.x + 8, 0.0f); }

// The first lane multiplies for all.
template <class E, int A, int B>
void multiply_add(Sum& sum, const Fragment<E, A>& a, const Fragment<E, B>& b) {
  struct Operands {
    Sum* sum;
    const Fragment<E, A>* a;
    const Fragment<E, B>* b;
  } mine{&sum, &a, &b};
  emulation::Fiber* lanes = emulation::publish(&mine);
  if (lane_of_thread() == 0) {
    float left[256], right[256], product[256] = {};
    const auto of = [&](int lane) { return static_cast<const Operands*>(lanes[lane].published); };
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 8; i++) {
        left[a.position(lane, i)] = static_cast<float>(of(lane)->a->x[i]);
        right[b.position(lane, i)] = static_cast<float>(of(lane)->b->x[i]);
      }
    for (int m = 0; m < 16; m++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++) product[m * 16 + n] += left[m * 16 + k] * right[k * 16 + n];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 8; i++) {
        float& total = of(lane)->sum->x[i];
        const int at = sum.position(lane, i);
        total = emulation::coarse() ? emulation::coarse_sum(left + at / 16 * 16, right + at % 16, total)
                                    : total + product[at];
      }
  }
  emulation::wait(emulation::Wait::warp);
}

template <class E>
constexpr bool has_products() {
  return true;
}

inline float to_float(float x) { return x; }
template <class E>
E from_float(float x) {
  return static_cast<E>(x);
}
#if defined(__FLT16_MAX__)
using Half = _Float16;
inline float to_float(Half x) { return static_cast<float>(x); }
#endif

inline float minus_infinity() { return -INFINITY; }
inline void warp_barrier() { emulation::wait(emulation::Wait::warp); }
inline void block_barrier() { emulation::wait(emulation::Wait::block); }

inline float swap_with_neighbour(float x) {
  emulation::Fiber* lanes = emulation::publish(&x);
  const float other = *static_cast<const float*>(lanes[lane_of_thread() ^ 1].published);
  warp_barrier();
  return other;
}

// Copies happen as late as the rules allow, so that a missing wait leaves NaN behind.
inline std::vector<std::vector<emulation::Copy>>& copies_of_thread() {
  return emulation::block().fibers[emulation::block().current].copies;
}

inline void copy_16(void* shared, const void* global, bool real) {
  copies_of_thread().back().push_back({shared, real ? global : nullptr});
}

inline void end_of_group() { copies_of_thread().emplace_back(); }

template <int PENDING>
void finish_copies() {
  auto& groups = copies_of_thread();
  while (groups.size() > PENDING + 1) {
    for (const emulation::Copy& copy : groups.front()) {
      if (copy.global)
        std::memcpy(copy.shared, copy.global, 16);
      else
        std::memset(copy.shared, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace mapet
