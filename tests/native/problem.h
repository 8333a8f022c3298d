// Random problems for the C++ entry points, made of a fuzzer's bytes: sizes, strides, alignments,
// types, labels and values. Buffers end where the last element does, so that sanitizers see every
// access behind it. The right answers are computed in fp64.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "../../csrc/rows.h"

#define CHECK(condition, ...)                                             \
  do {                                                                    \
    if (!(condition)) {                                                   \
      fprintf(stderr, "%s:%d: not %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                       \
      fprintf(stderr, "\n");                                              \
      abort();                                                            \
    }                                                                     \
  } while (false)

namespace fuzz {

using kto::DType;

// Random numbers from the given bytes, and from a generator seeded by them when they are used up.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), left_(size) {
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ data[i]) * 0x100000001b3u;
  }
  // Splitmix64 (Steele, Lea, Flood 2014).
  uint64_t random() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) {
    if (left_ == 0) return int64_t(random() % uint64_t(n));
    --left_;
    return *data_++ % n;
  }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T>
  T of(std::initializer_list<T> values) {
    return values.begin()[below(int64_t(values.size()))];
  }
  float uniform() { return float(random() >> 40) * 0x1p-24f; }
  float normal() { return sqrtf(-2 * logf(1 - uniform())) * cosf(6.2831853f * uniform()); }

 private:
  const uint8_t* data_;
  size_t left_;
  uint64_t state_ = 0xcbf29ce484222325u;
};

// A buffer filled with NaN that begins `lead` elements behind an address aligned to 16 bytes. The
// memory ends with the last element; the elements in front of the first one must stay untouched.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t lead = 0) : size_(size), lead_(lead) {
    const size_t bytes = size_t(size + lead) * sizeof(T);
    memory_ = static_cast<uint8_t*>(malloc(std::max<size_t>(1, bytes)));
    memset(memory_, kFill, bytes);
  }
  Buffer(const Buffer& other) : Buffer(other.size_, other.lead_) {
    memcpy(data(), other.data(), size_t(size_) * sizeof(T));
  }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    CHECK(untouched(memory_, lead_ * int64_t(sizeof(T))), "written in front of a buffer");
    free(memory_);
  }

  T* data() const { return reinterpret_cast<T*>(memory_) + lead_; }
  T& operator[](int64_t i) const { return data()[i]; }
  bool operator==(const Buffer& other) const {
    return memcmp(data(), other.data(), size_t(size_) * sizeof(T)) == 0;
  }

  static bool untouched(const uint8_t* p, int64_t bytes) {
    return std::all_of(p, p + bytes, [](uint8_t byte) { return byte == kFill; });
  }

 private:
  static constexpr uint8_t kFill = 0xff;  // a NaN in every floating type
  int64_t size_, lead_;
  uint8_t* memory_;
};

// A buffer of int32 or int64 indices.
class IndexBuffer {
 public:
  IndexBuffer(int64_t size, bool is_int64)
      : is_int64_(is_int64), bytes_(size * (is_int64 ? 8 : 4)) {}
  void set(int64_t i, int64_t value) {
    const int32_t narrow = int32_t(value);
    memcpy(bytes_.data() + i * (is_int64_ ? 8 : 4),
           is_int64_ ? static_cast<void*>(&value) : (void*)&narrow, is_int64_ ? 8 : 4);
  }
  kto::Indices indices() const { return {bytes_.data(), is_int64_}; }

 private:
  bool is_int64_;
  Buffer<uint8_t> bytes_;
};

// The floating-point types, written for clarity and not for speed.
inline int64_t itemsize(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline double epsilon(DType dtype) {
  return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
}

inline double decode(const uint8_t* p, DType dtype) {
  if (dtype == DType::f32) {
    float value;
    memcpy(&value, p, 4);
    return double(value);
  }
  uint16_t bits;
  memcpy(&bits, p, 2);
  const int digits = dtype == DType::f16 ? 10 : 7, bias = dtype == DType::f16 ? 15 : 127;
  const int mantissa = bits & ((1 << digits) - 1), exponent = (bits & 0x7fff) >> digits;
  double value =
      ldexp(mantissa + (exponent ? 1 << digits : 0), std::max(1, exponent) - bias - digits);
  if (exponent == 2 * bias + 1) value = mantissa ? NAN : INFINITY;
  return bits & 0x8000 ? -value : value;
}

// Truncates instead of rounding: tests can use any value of the type.
inline void encode(uint8_t* p, DType dtype, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t half = bits >> 16;
  if (dtype == DType::f16) {
    const int exponent = int(bits >> 23 & 0xff) - 112;
    const uint32_t magnitude = !isfinite(value) ? (isnan(value) ? 0x7e00 : 0x7c00)
                               : exponent >= 31 ? 0x7bff
                               : exponent <= 0  ? 0
                                                : uint32_t(exponent) << 10 | (bits >> 13 & 0x3ff);
    half = magnitude | (bits >> 16 & 0x8000);
  }
  const uint16_t low = uint16_t(half);
  memcpy(p, dtype == DType::f32 ? static_cast<void*>(&bits) : (void*)&low, size_t(itemsize(dtype)));
}

inline int64_t any_vocabulary(Choices& choices) {
  switch (choices.below(8)) {
    case 0:
      return 1 + choices.below(4);
    case 1:
      return choices.of<int64_t>({15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257});
    case 2:
      return 4076 + choices.below(40);  // about a block of csrc/cpu/kernels.cpp
    case 3:
      return 1 + choices.below(128) * 17;
    default:
      return 1 + choices.below(200);
  }
}

// The lengths of the sequences, packed or padded to one length.
struct Layout {
  bool packed;
  int64_t n_sequences, tokens = 0, n_rows = 0;
  std::vector<int64_t> offsets = {0};

  static Layout of_packed(std::vector<int64_t> offsets) {
    return {true, int64_t(offsets.size()) - 1, 0, offsets.back(), offsets};
  }
  static Layout of_one(int64_t n_rows) { return {false, 1, n_rows, n_rows, {0, n_rows}}; }

  static Layout of(Choices& choices, int64_t most_sequences, int64_t most_tokens) {
    Layout layout{choices.one_in(2), choices.below(most_sequences + 1)};
    if (!layout.packed) layout.tokens = choices.below(most_tokens + 1);
    for (int64_t i = 0; i < layout.n_sequences; ++i)
      layout.offsets.push_back(layout.offsets.back() +
                               (layout.packed ? choices.below(most_tokens + 1) : layout.tokens));
    layout.n_rows = layout.offsets.back();
    return layout;
  }
};

// kto::Rows and the memory that it points to.
class Problem {
 public:
  // all_scored: every label is a token, as in a chunk.
  Problem(Choices& choices, const Layout& layout, DType dtype, int64_t vocab,
          bool all_scored = false)
      : size(itemsize(dtype)),
        stride_t(vocab + (choices.one_in(2) ? 0 : choices.below(9))),
        stride_b(layout.tokens * stride_t + (choices.one_in(2) ? 0 : choices.below(9))),
        label_stride(all_scored ? 1 : 1 + choices.below(2)),
        logits(extent(layout, vocab) * size, choices.below(16 / size) * size),
        labels(layout.n_rows == 0 ? 0 : (layout.n_rows - 1) * label_stride + 1,
               all_scored || choices.one_in(2)),
        offsets(int64_t(layout.offsets.size()), choices.one_in(2)) {
    const int64_t ignore_index = all_scored ? -1 : choices.of<int64_t>({-100, -1, 0, 5});
    for (int64_t n = 0; n < layout.n_rows; ++n) {
      int64_t label = choices.one_in(4) ? choices.of<int64_t>({0, vocab - 1, vocab / 2})
                                        : int64_t(choices.random() % uint64_t(vocab));
      if (!all_scored && choices.one_in(4))
        label = choices.of<int64_t>(
            {ignore_index, ignore_index, -100, -1, vocab, INT32_MAX, INT32_MIN});
      labels.set(n * label_stride, label);
    }
    for (size_t i = 0; i < layout.offsets.size(); ++i) offsets.set(int64_t(i), layout.offsets[i]);
    rows = {logits.data(),
            dtype,
            layout.n_rows,
            layout.n_sequences,
            layout.tokens,
            vocab,
            layout.packed ? 0 : stride_b,
            stride_t,
            labels.indices(),
            layout.tokens * label_stride,
            label_stride,
            layout.packed ? offsets.indices() : kto::Indices{nullptr, false},
            ignore_index,
            !all_scored && choices.one_in(3)};
    const float base = choices.of({0.0f, 0.0f, 20.0f, -1e4f, 1e4f});
    const float spread = choices.of({0.0f, 1e-3f, 1.0f, 3.0f, 30.0f, 1e3f});
    const bool odd = choices.one_in(4);
    for (int64_t n = 0; n < rows.n_rows; ++n)
      for (int64_t v = 0; v < vocab; ++v) {
        float value = base + spread * choices.normal();
        if (odd && choices.random() % 64 == 0) {
          const float values[] = {-INFINITY, -INFINITY, -INFINITY, INFINITY,
                                  NAN,       1e30f,     -1e30f,    0.0f};
          value = values[choices.random() % 8];
        }
        encode(logits.data() + (kto::logits_offset(rows, n) + v) * size, dtype, value);
      }
  }
  Problem(const Problem&) = delete;

  double logit(int64_t n, int64_t v) const {
    return decode(logits.data() + (kto::logits_offset(rows, n) + v) * size, rows.dtype);
  }

  // Checks that nothing was written between the rows of a buffer with the logits' layout.
  void check_gaps(const Buffer<uint8_t>& buffer) const {
    for (int64_t n = 0; n + 1 < rows.n_rows; ++n) {
      const int64_t end = kto::logits_offset(rows, n) + rows.vocab;
      const int64_t gap = kto::logits_offset(rows, n + 1) - end;
      CHECK(Buffer<uint8_t>::untouched(buffer.data() + end * size, gap * size),
            "written behind row %ld", long(n));
    }
  }

  int64_t size, stride_t, stride_b, label_stride;
  Buffer<uint8_t> logits;
  IndexBuffer labels, offsets;
  kto::Rows rows;

 private:
  int64_t extent(const Layout& layout, int64_t vocab) const {
    if (layout.n_rows == 0) return 0;
    if (layout.packed) return (layout.n_rows - 1) * stride_t + vocab;
    return (layout.n_sequences - 1) * stride_b + (layout.tokens - 1) * stride_t + vocab;
  }
};

inline kto::Scale any_scale(Choices& choices) {
  const double logit_scale = choices.of({1.0, 1.0, 0.0625, 2.0});
  const double softcap = choices.of({0.0, 0.0, 2.0, 30.0});
  const double temperature = choices.of({1.0, 1.0, 0.7});
  const float slope = float(logit_scale / temperature);
  if (softcap == 0) return {1.0f, slope, slope, false};
  return {float(logit_scale / softcap), float(softcap / temperature), slope, true};
}

// The right answers for one row, in fp64.
struct Row {
  double logp, tolerance;  // the label's log-probability, and how far fp32 may be from it
  bool finite;             // no logit is NaN or +inf, and the label's is finite
  std::vector<double> gradient;
};

inline Row exact_row(const Problem& problem, int64_t n, int64_t label, const kto::Scale& scale) {
  const int64_t vocab = problem.rows.vocab;
  std::vector<double> z(size_t(vocab), 0.0), slope(size_t(vocab), double(scale.slope));
  double highest = -INFINITY, largest = 1;
  bool nan = false;
  for (int64_t v = 0; v < vocab; ++v) {
    const double x = problem.logit(n, v);
    const double u = scale.softcap ? tanh(x * scale.inner) : x;
    if (scale.softcap) slope[size_t(v)] *= 1 - u * u;
    z[size_t(v)] = u * scale.outer;
    nan = nan || isnan(u) || u == INFINITY;
    highest = std::max(highest, z[size_t(v)]);
    if (isfinite(z[size_t(v)])) largest = std::max(largest, fabs(z[size_t(v)]));
  }
  Row row{NAN, 1e-6 * largest + 1e-6, !nan && isfinite(z[size_t(label)]),
          std::vector<double>(size_t(vocab), NAN)};
  if (nan) return row;
  if (z[size_t(label)] == -INFINITY) {
    row.logp = -INFINITY;
    return row;
  }
  double sum = 0;
  for (double value : z) sum += exp(value - highest);
  row.logp = z[size_t(label)] - highest - log(sum);
  for (size_t v = 0; v < size_t(vocab); ++v)
    row.gradient[v] = slope[v] * ((int64_t(v) == label) - exp(z[v] - highest) / sum);
  return row;
}

inline void check_logp(const Row& row, float logp, int64_t n) {
  if (isfinite(row.logp))
    CHECK(fabs(double(logp) - row.logp) <= row.tolerance + 4e-7 * fabs(row.logp),
          "row %ld: %.9g for %.9g", long(n), double(logp), row.logp);
  else
    CHECK(isnan(row.logp) ? isnan(logp) : double(logp) == row.logp, "row %ld: %g for %g", long(n),
          double(logp), row.logp);
}

// Checks `found` against g times the gradient of the row's log-probability.
inline void check_gradient(const Row& row, const uint8_t* found, float g, const kto::Rows& rows,
                           const kto::Scale& scale, int64_t n) {
  if (!row.finite) return;
  const double reach = fabs(double(g) * scale.slope);
  for (int64_t v = 0; v < rows.vocab; ++v) {
    const double mine = decode(found + v * itemsize(rows.dtype), rows.dtype),
                 exact = g * row.gradient[size_t(v)];
    const double allowed =
        reach * (4 * row.tolerance + 1e-6) + epsilon(rows.dtype) * fabs(exact) + 6e-8;
    CHECK(fabs(mine - exact) <= allowed, "row %ld, token %ld: %.9g for %.9g", long(n), long(v),
          mine, exact);
  }
}

}  // namespace fuzz
