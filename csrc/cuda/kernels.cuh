// The kernels' bodies, for the GPU and for the host's emulation of a block: a block scores one row
// of logits, or one share of it where rows are few.
//
// The logits are read in vectors of 16 bytes, kUnroll of them in flight a thread. A row may start
// anywhere: the elements in front of its first aligned address and behind its last whole vector
// (the edge) are read one by one. What is vocabulary-sized is fp32, what there is one of for a row
// or a sequence fp64.
#pragma once

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "host.h"
#endif

namespace kto {

constexpr int kUnroll = 4;
constexpr float kLog2e = 1.4426950408889634f;
// A running maximum starts here, lower than any logit: -inf - (-inf) would be NaN.
constexpr float kLowest = -3.4028234663852886e38f;

// Scores --------------------------------------------------------------------------------------

// To a few units in the last place, near 0 too: a polynomial (Cephes' tanhf) below 0.625, an
// exponential above. tanhf branches, which keeps loads from being in flight together.
KTO_DEVICE float hyperbolic_tangent(float x) {
  const float a = fabsf(x), z = x * x;
  const float far = 1 - divide(2, power_of_two(a * (2 * kLog2e)) + 1);
  float near = -5.70498872745e-3f;
  near = fmaf(near, z, 2.06390887954e-2f);
  near = fmaf(near, z, -5.37397155531e-2f);
  near = fmaf(near, z, 1.33314422036e-1f);
  near = fmaf(near, z, -3.33332819422e-1f);
  return a < 0.625f ? fmaf(x * z, near, x) : copysignf(far, x);
}

// The score u of a logit; z = scale.outer * u.
template <bool kSoftcap>
KTO_DEVICE float score(float x, const Scale& scale) {
  return kSoftcap ? hyperbolic_tangent(x * scale.inner) : x;
}

template <class T>
constexpr int kPerWord = int(4 / sizeof(typename T::Element));
template <class T>
constexpr int kPerVector = 4 * kPerWord<T>;

template <class T>
KTO_DEVICE void unpack(const Vector& v, float* u) {
  T::unpack(v.x, u);
  T::unpack(v.y, u + kPerWord<T>);
  T::unpack(v.z, u + 2 * kPerWord<T>);
  T::unpack(v.w, u + 3 * kPerWord<T>);
}

template <class T>
KTO_DEVICE Vector pack(const float* u) {
  return {T::pack(u), T::pack(u + kPerWord<T>), T::pack(u + 2 * kPerWord<T>),
          T::pack(u + 3 * kPerWord<T>)};
}

template <class T>
KTO_DEVICE float load_element(const typename T::Element* p) {
  float u[kPerWord<T>];
  T::unpack(*p, u);
  return u[0];
}

template <class T>
KTO_DEVICE void store_element(typename T::Element* p, float value) {
  const float u[2] = {value, 0};
  *p = static_cast<typename T::Element>(T::pack(u));
}

// A row's whole vectors, and the share of them that belongs to a block.
struct Line {
  int head, vectors;  // elements in front of the vectors, and how many vectors
  int first, last;    // the share
  int edge;           // elements that are in no vector, where they belong to this block; else 0
};

template <class T>
KTO_DEVICE Line line_of(const void* row, int64_t vocab, int split, int splits) {
  const int count = int(vocab);
  const int to_boundary = int((0 - reinterpret_cast<uintptr_t>(row)) & (sizeof(Vector) - 1)) /
                          int(sizeof(typename T::Element));
  Line line;
  line.head = to_boundary < count ? to_boundary : count;
  line.vectors = (count - line.head) / kPerVector<T>;
  line.first = int(int64_t(line.vectors) * split / splits);
  line.last = int(int64_t(line.vectors) * (split + 1) / splits);
  line.edge = split == 0 ? count - line.vectors * kPerVector<T> : 0;
  return line;
}

// Position in the row of the i-th element of the edge.
template <class T>
KTO_DEVICE int edge_position(const Line& line, int i) {
  return i < line.head ? i : i + line.vectors * kPerVector<T>;
}

// Calls whole(v) for the first vector v of each unrolled step of a thread, then single(v).
template <int kThreads, class Whole, class Single>
KTO_DEVICE void walk(const Line& line, int thread, Whole&& whole, Single&& single) {
  int v = line.first + thread;
  for (; v < line.last - (kUnroll - 1) * kThreads; v += kUnroll * kThreads) whole(v);
  for (; v < line.last; v += kThreads) single(v);
}

// The forward -----------------------------------------------------------------------------------

struct Running {
  float maximum, sum;
};

// Adds scores to a running softmax. No NaN but from NaN or +inf: the maximum is never -inf.
template <int kCount>
KTO_DEVICE void fold(const float* u, Running& running, float rate) {
  float maximum = running.maximum;
  for (int k = 0; k < kCount; ++k) maximum = fmaxf(maximum, u[k]);
  float sums[2] = {running.sum * power_of_two((running.maximum - maximum) * rate), 0};
  for (int k = 0; k < kCount; ++k) sums[k % 2] += power_of_two((u[k] - maximum) * rate);
  running = {maximum, sums[0] + sums[1]};
}

KTO_DEVICE Share join(const Share& a, const Share& b, const Scale& scale) {
  const double outer = scale.outer;
  return {merge<double>({a.maximum * outer, a.sum}, {b.maximum * outer, b.sum}).sum,
          fmaxf(a.maximum, b.maximum)};
}

// The softmax of a block's share of a row, the label left out; for thread 0.
template <class T, bool kSoftcap, class Block>
KTO_DEVICE Share softmax_share(Block& block, const typename T::Element* x, int64_t label,
                               const Line& line, const Scale& scale) {
  constexpr int kCount = kPerVector<T>;
  const float rate = scale.outer * kLog2e;
  const typename T::Element* body = x + line.head;
  // Division alone would find a label in the head in vector 0.
  const int at = int(label) - line.head;
  const int label_vector = at < 0 ? -1 : at / kCount;
  // The scores of vector v.
  const auto scores = [&](const Vector& vector, int v, float* u) {
    unpack<T>(vector, u);
    for (int k = 0; k < kCount; ++k) u[k] = score<kSoftcap>(u[k], scale);
    if (v == label_vector)
      for (int k = 0; k < kCount; ++k) u[k] = k == at % kCount ? -INFINITY : u[k];
  };
  const auto thread_share = [&](int thread) -> Share {
    Running running = {kLowest, 0};
    walk<Block::kThreads>(
        line, thread,
        [&](int v) {
          Vector vectors[kUnroll];
          for (int k = 0; k < kUnroll; ++k)
            vectors[k] = load_vector(body + int64_t(v + k * Block::kThreads) * kCount);
          float u[kUnroll * kCount];
          for (int k = 0; k < kUnroll; ++k)
            scores(vectors[k], v + k * Block::kThreads, u + k * kCount);
          fold<kUnroll * kCount>(u, running, rate);
        },
        [&](int v) {
          float u[kCount];
          scores(load_vector(body + int64_t(v) * kCount), v, u);
          fold<kCount>(u, running, rate);
        });
    for (int i = thread; i < line.edge; i += Block::kThreads) {
      const int v = edge_position<T>(line, i);
      const float u = score<kSoftcap>(load_element<T>(x + v), scale);
      if (v != label) fold<1>(&u, running, rate);
    }
    return {running.sum, running.maximum};
  };
  return block.softmax(
      thread_share,
      [&](const Share& share, float maximum) {
        return double(float(share.sum) * power_of_two((share.maximum - maximum) * rate));
      },
      [&](const Share& a, const Share& b) { return join(a, b, scale); });
}

// Scores row n of a set, or a block's share of it; whether this block is the row's last.
template <class T, bool kSoftcap, class Block>
KTO_DEVICE bool score_row(Block& block, const ForwardArguments& arguments, const RowSet& set,
                          int64_t row, int split) {
  const Rows& rows = set.rows;
  const Scale& scale = arguments.scale;
  const int splits = arguments.splits;
  const int64_t n = row - set.first;
  const int64_t label = label_of(rows, n);
  if (label < 0) {  // an ignored row costs no pass over its logits
    if (split == 0)
      block.once([&] {
        set.logps[n] = 0;
        if (set.sum != nullptr) set.maximum[n] = set.sum[n] = 0;
      });
    return split == 0;
  }
  const auto* x = static_cast<const typename T::Element*>(rows.logits) + logits_offset(rows, n);
  Share others =
      softmax_share<T, kSoftcap>(block, x, label, line_of<T>(x, rows.vocab, split, splits), scale);
  if (splits > 1) {
    Share* shares = arguments.shares + row * splits;
    block.once([&] { shares[split] = others; });
    if (!block.arrive(arguments.arrivals + 1 + row, splits)) return false;
    block.once([&] {
      others = shares[0];
      KTO_ROLLED
      for (int i = 1; i < splits; ++i) others = join(others, shares[i], scale);
    });
  }
  block.once([&] {
    const float u = score<kSoftcap>(load_element<T>(x + label), scale);
    const double outer = scale.outer, y = u * outer;
    const double reference = others.sum == 0 ? -INFINITY : others.maximum * outer;
    set.logps[n] = float(label_logp<double>({reference, others.sum}, y));
    if (set.sum == nullptr) return;
    const float maximum = fmaxf(others.maximum, u);
    set.maximum[n] = maximum;
    set.sum[n] = float(merge<double>({others.maximum * outer, others.sum},
                                     {maximum * outer, decay<double>(y, maximum * outer)})
                           .sum);
  });
  return true;
}

KTO_DEVICE double value_at(const Values& values, int64_t i) {
  const int64_t at = i * values.stride;
  switch (values.type) {
    case int(DType::f32):
      return load_element<Codec<DType::f32>>(static_cast<const uint32_t*>(values.data) + at);
    case int(DType::f16):
      return load_element<Codec<DType::f16>>(static_cast<const uint16_t*>(values.data) + at);
    case int(DType::bf16):
      return load_element<Codec<DType::bf16>>(static_cast<const uint16_t*>(values.data) + at);
    default:
      return static_cast<const double*>(values.data)[at];
  }
}

struct Tally {
  double sum, count;
};
KTO_DEVICE Tally operator+(const Tally& a, const Tally& b) {
  return {a.sum + b.sum, a.count + b.count};
}

// Stage sequence_logps of one set: a warp a sequence.
template <class Block>
KTO_DEVICE void sequence_logps(Block& block, const RowSet& set, bool average) {
  block.template sums<Tally>(
      set.rows.n_sequences,
      [&](int64_t i, int lane, int lanes) -> Tally {
        const Range range = sequence_range(set.rows, i);
        Tally tally = {0, 0};
        for (int64_t n = range.begin + lane; n < range.end; n += lanes) tally.sum += set.logps[n];
        if (average) KTO_ROLLED
        for (int64_t n = range.begin + lane; n < range.end; n += lanes)
          tally.count += label_within(set.rows, n, range.end) >= 0;
        return tally;
      },
      [&](int64_t i, const Tally& tally) {
        set.sums[i] = average ? tally.sum / fmax(1.0, tally.count) : tally.sum;
        if (set.counts != nullptr) set.counts[i] = tally.count;
      });
}

template <class Block>
KTO_DEVICE double reference_point(Block& block, const Stages& stages) {
  double mean = stages.kl_value;
  if (stages.kl_logps.data != nullptr) {
    mean = block.total([&](int thread) {
      double sum = 0;
      KTO_ROLLED
      for (int64_t j = thread; j < stages.n_kl; j += Block::kThreads)
        sum += difference(value_at(stages.kl_logps, j), stages.kl_ref_logps.data == nullptr
                                                            ? 0.0
                                                            : value_at(stages.kl_ref_logps, j));
      return sum;
    });
    mean /= double(stages.n_kl > 1 ? stages.n_kl : 1);
  } else if (stages.kl.data != nullptr) {
    mean = value_at(stages.kl, 0);
  }
  return mean < 0 ? 0 : mean;  // NaN stays NaN
}

// The stages after the seam, by the block that finished the last row.
template <class Block>
KTO_DEVICE void sequence_stages(Block& block, const ForwardArguments& arguments) {
  const Stages& stages = arguments.stages;
  KTO_ROLLED
  for (int k = 0; k < arguments.n_sets; ++k)
    sequence_logps(block, arguments.sets[k], stages.average);
  const double z0 = reference_point(block, stages);
  const int64_t count = stages.n_sequences;
  const double share =
      stages.reduction == Reduction::mean ? 1.0 / double(count > 1 ? count : 1) : 1.0;
  const double total = block.total([&](int thread) {
    double sum = 0;
    KTO_ROLLED
    for (int64_t i = thread; i < count; i += Block::kThreads) {
      const double ref = stages.ref_logps.data == nullptr ? 0.0 : value_at(stages.ref_logps, i);
      const double log_ratio = difference(stages.logps[i], ref);
      stages.ref_logps_out[i] = ref;
      stages.rewards[i] = float(stages.options.beta * log_ratio);
      const SequenceLoss loss = sequence_loss(
          log_ratio, z0, stages.desirable[i * stages.desirable_stride], stages.options);
      const double tokens = stages.average ? fmax(1.0, stages.counts[i]) : 1.0;
      stages.coefficients[i] = float(loss.slope * share / tokens);
      if (stages.reduction == Reduction::none) stages.loss[i] = float(loss.loss);
      sum += loss.loss;
    }
    return sum;
  });
  block.once([&] {
    *stages.kl_out = float(z0);
    if (stages.reduction != Reduction::none) *stages.loss = float(total * share);
  });
}

template <class T, bool kSoftcap, class Block>
KTO_DEVICE void forward(Block& block, const ForwardArguments& arguments) {
  const int64_t row = block.index() / unsigned(arguments.splits);
  const int split = int(block.index() % unsigned(arguments.splits));
  bool finished = split == 0;
  if (row < arguments.n_rows) {
    int k = 0;
    while (k + 1 < arguments.n_sets && row >= arguments.sets[k + 1].first) ++k;
    finished = score_row<T, kSoftcap>(block, arguments, arguments.sets[k], row, split);
  }
  if (!arguments.stages.wanted || !finished) return;
  // Where there is no row at all, one block comes for the sequences' sake.
  if (block.arrive(arguments.arrivals, arguments.n_rows > 1 ? arguments.n_rows : 1))
    sequence_stages(block, arguments);
}

// The gradient ----------------------------------------------------------------------------------

// The gradient of a row, or of a share: g dlogp/dx, over the logits or into another buffer.
template <class T, bool kSoftcap, class Block>
KTO_DEVICE void backward(Block& block, const BackwardArguments& arguments) {
  constexpr int kCount = kPerVector<T>;
  constexpr int kThreads = Block::kThreads;
  using Element = typename T::Element;
  const Rows& rows = arguments.rows;
  const Scale& scale = arguments.scale;
  const int64_t n = block.index() / unsigned(arguments.splits);
  const int split = int(block.index() % unsigned(arguments.splits));
  const int64_t label = label_of(rows, n);
  const float g = label < 0 ? 0.0f : gradient_of(arguments.gradient, rows, n);
  Element* out = static_cast<Element*>(arguments.out) +
                 (rows.tokens == 0 ? n * arguments.out_stride_t
                                   : n / rows.tokens * arguments.out_stride_b +
                                         n % rows.tokens * arguments.out_stride_t);
  // Stores are aligned; loads too where the gradient lies as the logits do, which it does in place.
  const Line line = line_of<T>(out, rows.vocab, split, arguments.splits);
  Element* out_body = out + line.head;
  if (g == 0) {
    block.each([&](int thread) {
      for (int v = line.first + thread; v < line.last; v += kThreads)
        store_vector(out_body + int64_t(v) * kCount, Vector{0, 0, 0, 0});
      for (int i = thread; i < line.edge; i += kThreads) out[edge_position<T>(line, i)] = 0;
    });
    return;
  }
  const Element* x = static_cast<const Element*>(rows.logits) + logits_offset(rows, n);
  const Element* body = x + line.head;
  const bool aligned = (reinterpret_cast<uintptr_t>(body) & (sizeof(Vector) - 1)) == 0;
  const float rate = scale.outer * kLog2e;
  const float maximum = arguments.maximum[n];
  const float row_sum = arguments.sum[n];
  const double slope = double(g) * scale.slope;
  const float factor = float(row_sum == 0 ? -slope : -slope / row_sum);
  const auto gradient = [&](float x_v) {
    const float u = score<kSoftcap>(x_v, scale);
    const float p = power_of_two((u - maximum) * rate) * factor;
    return kSoftcap ? p * (1.0f - u * u) : p;
  };
  const auto gradients = [&](const Vector& vector, int v) {
    float u[kCount];
    unpack<T>(vector, u);
    for (int k = 0; k < kCount; ++k) u[k] = gradient(u[k]);
    store_vector(out_body + int64_t(v) * kCount, pack<T>(u));
  };
  // Whether the label is in this block's share.
  const int at = int(label) - line.head;
  const bool in_vectors = at >= 0 && at / kCount < line.vectors;
  const bool mine = in_vectors ? at / kCount >= line.first && at / kCount < line.last : split == 0;
  float y = 0;
  if (kSoftcap) {
    if (mine) y = score<kSoftcap>(load_element<T>(x + label), scale);
    block.barrier();  // in place: all have read the label's logit before one overwrites it
  }
  block.each([&](int thread) {
    if (aligned) {
      walk<kThreads>(
          line, thread,
          [&](int v) {
            Vector vectors[kUnroll];
            for (int k = 0; k < kUnroll; ++k)
              vectors[k] = load_vector(body + int64_t(v + k * kThreads) * kCount);
            for (int k = 0; k < kUnroll; ++k) gradients(vectors[k], v + k * kThreads);
          },
          [&](int v) { gradients(load_vector(body + int64_t(v) * kCount), v); });
    } else {
      for (int v = line.first + thread; v < line.last; v += kThreads) {
        float u[kCount];
        for (int k = 0; k < kCount; ++k)
          u[k] = gradient(load_element<T>(body + int64_t(v) * kCount + k));
        store_vector(out_body + int64_t(v) * kCount, pack<T>(u));
      }
    }
    for (int i = thread; i < line.edge; i += kThreads) {
      const int v = edge_position<T>(line, i);
      store_element<T>(out + v, gradient(load_element<T>(x + v)));
    }
  });
  if (!mine) return;
  block.barrier();  // after -g p, which the same block wrote there
  // 1 - p from the log-probability: rounding p first would lose every near-certain token.
  block.once([&] {
    const double entry = slope * -expm1(double(arguments.logps[n]));
    store_element<T>(out + label, float(kSoftcap ? entry * (1 - double(y) * y) : entry));
  });
}

// Calls body with the logits' type and the softcap as compile-time constants.
template <class Body>
void dispatch(DType dtype, bool softcap, Body&& body) {
  const auto with_type = [&](auto codec) {
    if (softcap)
      body(codec, std::true_type{});
    else
      body(codec, std::false_type{});
  };
  switch (dtype) {
    case DType::f32:
      return with_type(Codec<DType::f32>{});
    case DType::f16:
      return with_type(Codec<DType::f16>{});
    case DType::bf16:
      return with_type(Codec<DType::bf16>{});
  }
}

}  // namespace kto
