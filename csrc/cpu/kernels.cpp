// Forward and backward over the rows of a set of logits: one read forward, one read and one write
// backward. Compiled once per instruction set, with KTO_ISA naming the table it fills.
#include "kernels.h"

#include "vector.h"

namespace kto {
namespace {

constexpr int64_t kBlock = 1024;  // scores kept in L1 between the maximum and the sum

template <bool kSoftcap>
inline Floats score(Floats x, const Scale& scale) {
  if constexpr (kSoftcap) return tanh(x * scale.inner);
  return x;
}

// Adds the scores of x[0, n) to a partial softmax.
template <class T, bool kSoftcap>
void accumulate(const T* x, int64_t n, const Scale& scale, Partial<double>& partial) {
  alignas(KTO_VECTOR_BYTES) float scores[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = n - start < kBlock ? n - start : kBlock;
    const T* block = x + start;
    const int64_t full = length / (4 * kLanes) * (4 * kLanes);

    Floats maxima[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    int64_t v = 0;
    for (; v < full; v += 4 * kLanes)
      for (int k = 0; k < 4; ++k) {
        const Floats u = score<kSoftcap>(load(block + v + k * kLanes), scale);
        store(scores + v + k * kLanes, u);
        maxima[k] = max(maxima[k], u);
      }
    for (; v < length; v += kLanes) {
      // A softcap maps the missing lanes' -inf to -1: they must stay -inf.
      const bool whole = v + kLanes <= length;
      Floats u = score<kSoftcap>(whole ? load(block + v) : load_tail(block + v, length - v), scale);
      if (kSoftcap && !whole)
        for (int64_t k = length - v; k < kLanes; ++k) u[k] = -INFINITY;
      store(scores + v, u);
      maxima[0] = max(maxima[0], u);
    }
    const int64_t padded = v;

    const float block_max = reduce_max(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3])));
    if (block_max > partial.max) {
      partial.sum *= decay<double>(partial.max, block_max, scale.scale);
      partial.max = block_max;
    }
    // Nothing but -inf so far: any finite reference makes exp(-inf) = 0 (and keeps NaN).
    const Floats reference = splat(partial.max == -INFINITY ? 0.0f : float(partial.max));
    Floats sums[4] = {};
    for (v = 0; v < full; v += 4 * kLanes)
      for (int k = 0; k < 4; ++k)
        sums[k] += exp_nonpositive((load(scores + v + k * kLanes) - reference) * scale.scale);
    for (; v < padded; v += kLanes)
      sums[0] += exp_nonpositive((load(scores + v) - reference) * scale.scale);
    partial.sum += reduce_sum(sums[0]) + reduce_sum(sums[1]) + reduce_sum(sums[2]) +
                   reduce_sum(sums[3]);
  }
}

template <class T, bool kSoftcap>
void forward_row(const T* x, int64_t label, const Rows& rows, const Scale& scale,
                 const RowOutputs& out, int64_t n) {
  Partial<double> others = {-INFINITY, 0.0};
  accumulate<T, kSoftcap>(x, label, scale, others);
  accumulate<T, kSoftcap>(x + label + 1, rows.vocab - label - 1, scale, others);
  const double y = score<kSoftcap>(splat(load_one(x + label)), scale)[0];
  out.logps[n] = float(label_logp<double>(others, y, scale.scale));
  if (out.max) {
    const Partial<double> all = merge<double>(others, {y, y > -INFINITY ? 1.0 : 0.0}, scale.scale);
    out.max[n] = float(all.max);
    out.sum[n] = float(all.sum);
  }
}

template <class T, bool kSoftcap>
void forward(const Rows& rows, const Scale& scale, const RowOutputs& out, int64_t begin,
             int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = label_of(rows, n);
    if (label < 0) {  // an ignored row costs no pass over its logits
      out.logps[n] = 0;
      if (out.max) out.max[n] = out.sum[n] = 0;
      continue;
    }
    forward_row<T, kSoftcap>(static_cast<const T*>(rows.logits) + logits_offset(rows, n), label,
                             rows, scale, out, n);
  }
}

// out[v] = d/dx_v of the label's log-probability, times g: -g p_v, and g (1 - p_y) at the label.
template <class T, bool kSoftcap>
void backward_row(const T* x, T* out, int64_t vocab, int64_t label, float g, float logp, float max,
                  float sum, const Scale& scale) {
  const double slope = double(g) * scale.slope;
  const float y = score<kSoftcap>(splat(load_one(x + label)), scale)[0];
  const Floats factor = splat(float(sum > 0 ? -slope / sum : -slope));
  const Floats reference = splat(max == -INFINITY ? 0.0f : max);
  const auto gradient = [&](Floats x_v) {
    const Floats u = score<kSoftcap>(x_v, scale);
    Floats p = exp_nonpositive((u - reference) * scale.scale) * factor;
    if constexpr (kSoftcap) p = p * (1.0f - u * u);
    return p;
  };
  int64_t v = 0;
  for (; v + 4 * kLanes <= vocab; v += 4 * kLanes)
    for (int k = 0; k < 4; ++k)
      store(out + v + k * kLanes, gradient(load(x + v + k * kLanes)));
  for (; v + kLanes <= vocab; v += kLanes) store(out + v, gradient(load(x + v)));
  if (v < vocab) store_tail(out + v, gradient(load_tail(x + v, vocab - v)), vocab - v);
  // 1 - p_y from the log-probability: rounding p_y first would lose every near-certain token.
  store_one(out + label, float(slope * -expm1(double(logp)) * (kSoftcap ? 1.0 - double(y) * y : 1.0)));
}

template <class T, bool kSoftcap>
void backward(const Rows& rows, const Scale& scale, const Gradient& gradient,
              const RowStatistics& statistics, const Output& output, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = label_of(rows, n);
    const float g = label < 0 ? 0.0f : gradient_of(gradient, rows, n);
    const int64_t offset = rows.tokens == 0 ? n * output.stride_t
                                            : n / rows.tokens * output.stride_b +
                                                  n % rows.tokens * output.stride_t;
    T* out = static_cast<T*>(output.data) + offset;
    if (g == 0) {
      memset(out, 0, rows.vocab * sizeof(T));
      continue;
    }
    const T* x = static_cast<const T*>(rows.logits) + logits_offset(rows, n);
    backward_row<T, kSoftcap>(x, out, rows.vocab, label, g, statistics.logps[n], statistics.max[n],
                              statistics.sum[n], scale);
  }
}

// Calls body with a value of the logits' type and the softcap as a compile-time constant.
template <class Body>
void dispatch(DType dtype, bool softcap, Body&& body) {
  const auto with_type = [&](auto value) {
    if (softcap)
      body.template operator()<decltype(value), true>();
    else
      body.template operator()<decltype(value), false>();
  };
  switch (dtype) {
    case DType::f32: return with_type(float{});
    case DType::f16: return with_type(f16{});
    case DType::bf16: return with_type(bf16{});
  }
}

void forward_any(const Rows& rows, const Scale& scale, const RowOutputs& out, int64_t begin,
                 int64_t end) {
  dispatch(rows.dtype, scale.softcap, [&]<class T, bool kSoftcap>() {
    forward<T, kSoftcap>(rows, scale, out, begin, end);
  });
}

void backward_any(const Rows& rows, const Scale& scale, const Gradient& gradient,
                  const RowStatistics& statistics, const Output& output, int64_t begin,
                  int64_t end) {
  dispatch(rows.dtype, scale.softcap, [&]<class T, bool kSoftcap>() {
    backward<T, kSoftcap>(rows, scale, gradient, statistics, output, begin, end);
  });
}

}  // namespace

#define KTO_PASTE(a, b) a##b
#define KTO_TABLE(isa) KTO_PASTE(kKernels_, isa)
#define KTO_STRING(isa) #isa
#define KTO_NAME(isa) KTO_STRING(isa)

extern const Kernels KTO_TABLE(KTO_ISA) = {KTO_NAME(KTO_ISA), forward_any, backward_any};

}  // namespace kto
