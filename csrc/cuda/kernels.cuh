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
constexpr double kLn2 = 0.69314718055994531;
// A running maximum starts here, lower than any logit: -inf - (-inf) would be NaN.
constexpr float kLowest = -3.4028234663852886e38f;
// 2^w is 0 here, and w 2^w would be NaN at -inf: w goes no lower.
constexpr float kVanished = -256;

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

// What a thread found in the scores that it read, the label's left out. What follows the sum is for
// outputs.
struct Running {
  float maximum, sum;
  float weighted;  // sum of w 2^w, where `sum` is that of 2^w
  float total;     // of the scores, the label's not left out
  bool beaten;     // a logit is higher than the label's, or in front of it as high
};

// Of two shares at one maximum.
KTO_DEVICE Share operator+(const Share& a, const Share& b) { return {a.sum + b.sum, a.maximum}; }

KTO_DEVICE Share join(const Share& a, const Share& b, const Scale& scale) {
  const double outer = scale.outer;
  return {merge<double>({a.maximum * outer, a.sum}, {b.maximum * outer, b.sum}).sum,
          fmaxf(a.maximum, b.maximum)};
}

// A share with what outputs need beside it.
struct OutputShare : Share {
  double weighted;  // sum of exp(z - reference) (z - reference)
  double total;
  double beaten;  // how many threads found it so
};

KTO_DEVICE OutputShare operator+(const OutputShare& a, const OutputShare& b) {
  return {static_cast<const Share&>(a) + b, a.weighted + b.weighted, a.total + b.total,
          a.beaten + b.beaten};
}

// Moves to a maximum that is not lower.
template <bool kOutputs>
KTO_DEVICE void raise(float maximum, Running& running, float rate) {
  const float w = (running.maximum - maximum) * rate;
  const float factor = power_of_two(w);
  if (kOutputs) running.weighted = (running.weighted + fmaxf(w, kVanished) * running.sum) * factor;
  running.sum *= factor;
  running.maximum = maximum;
}

// Adds scores to a running softmax. No NaN but from NaN or +inf: the maximum is never -inf.
template <int kCount, bool kOutputs>
KTO_DEVICE void fold(const float* u, Running& running, float rate) {
  float maximum = running.maximum;
  for (int k = 0; k < kCount; ++k) maximum = fmaxf(maximum, u[k]);
  raise<kOutputs>(maximum, running, rate);
  float sums[2] = {running.sum, 0}, weighted[2] = {running.weighted, 0};
  for (int k = 0; k < kCount; ++k) {
    const float w = (u[k] - maximum) * rate, power = power_of_two(w);
    sums[k % 2] += power;
    if (kOutputs) weighted[k % 2] = fmaf(fmaxf(w, kVanished), power, weighted[k % 2]);
  }
  running.sum = sums[0] + sums[1];
  running.weighted = weighted[0] + weighted[1];
}

// The softmax of a block's share of a row, the label left out, as a Share or an OutputShare; for
// thread 0. kAgain: the kernel reads the row again.
template <class T, bool kSoftcap, bool kOutputs, bool kAgain, class Block>
KTO_DEVICE auto softmax_share(Block& block, const typename T::Element* x, int64_t label,
                              const Line& line, const Scale& scale) {
  constexpr int kCount = kPerVector<T>;
  const float rate = scale.outer * kLog2e;
  const typename T::Element* body = x + line.head;
  // Division alone would find a label in the head in vector 0.
  const int at = int(label) - line.head;
  const int label_vector = at < 0 ? -1 : at / kCount;
  // Logits are compared, as a softcap may tie their scores: `above` is the lowest higher than y.
  const float y = kOutputs ? load_element<T>(x + label) : 0;
  const float above = y < INFINITY ? nextafterf(y, INFINITY) : NAN;
  // The scores of vector v.
  const auto scores = [&](const Vector& vector, int v, float* u, Running& running) {
    unpack<T>(vector, u);
    if (kOutputs) {
      const float bound = v < label_vector ? y : above;
      for (int k = 0; k < kCount; ++k) running.beaten |= u[k] >= bound;
      if (v == label_vector)
        for (int k = 0; k < kCount; ++k) running.beaten |= k < at % kCount && u[k] >= y;
    }
    for (int k = 0; k < kCount; ++k) {
      u[k] = score<kSoftcap>(u[k], scale);
      if (kOutputs) running.total += u[k];
    }
    if (v == label_vector)
      for (int k = 0; k < kCount; ++k) u[k] = k == at % kCount ? -INFINITY : u[k];
  };
  const auto thread_softmax = [&](int thread) -> Running {
    Running running = {kLowest, 0, 0, 0, false};
    walk<Block::kThreads>(
        line, thread,
        [&](int v) {
          Vector vectors[kUnroll];
          for (int k = 0; k < kUnroll; ++k)
            vectors[k] = load_vector<kAgain>(body + int64_t(v + k * Block::kThreads) * kCount);
          float u[kUnroll * kCount];
          for (int k = 0; k < kUnroll; ++k)
            scores(vectors[k], v + k * Block::kThreads, u + k * kCount, running);
          fold<kUnroll * kCount, kOutputs>(u, running, rate);
        },
        [&](int v) {
          float u[kCount];
          scores(load_vector<kAgain>(body + int64_t(v) * kCount), v, u, running);
          fold<kCount, kOutputs>(u, running, rate);
        });
    for (int i = thread; i < line.edge; i += Block::kThreads) {
      const int v = edge_position<T>(line, i);
      const float x_v = load_element<T>(x + v), u = score<kSoftcap>(x_v, scale);
      if (kOutputs) {
        running.total += u;
        running.beaten |= x_v >= (v < label ? y : above);
      }
      if (v != label) fold<1, kOutputs>(&u, running, rate);
    }
    return running;
  };
  const auto share_at = [&](Running running, float maximum) {
    raise<kOutputs>(maximum, running, rate);
    const Share share = {running.sum, maximum};
    if constexpr (kOutputs)
      return OutputShare{share, running.weighted * kLn2, running.total, double(running.beaten)};
    else
      return share;
  };
  return block.softmax(thread_softmax, share_at);
}

// The label's log-probability, given the score u of its logit.
KTO_DEVICE float label_logp(const Share& others, float u, const Scale& scale) {
  const double outer = scale.outer;
  const double reference = others.sum == 0 ? -INFINITY : others.maximum * outer;
  return float(label_logp<double>({reference, others.sum}, u * outer));
}

// The softmax of all scores.
KTO_DEVICE Share with_label(const Share& others, float u, const Scale& scale) {
  const double outer = scale.outer;
  const float maximum = fmaxf(others.maximum, u);
  const double decayed = decay<double>(u * outer, maximum * outer);
  return {merge<double>({others.maximum * outer, others.sum}, {maximum * outer, decayed}).sum,
          maximum};
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
  if (label == kIgnored) {  // an ignored row costs no pass over its logits
    if (split == 0)
      block.once([&] {
        set.logps[n] = 0;
        if (set.sum != nullptr) set.maximum[n] = set.sum[n] = 0;
      });
    return split == 0;
  }
  const auto* x = static_cast<const typename T::Element*>(rows.logits) + logits_offset(rows, n);
  Share others = softmax_share<T, kSoftcap, false, false>(
      block, x, label, line_of<T>(x, rows.vocab, split, splits), scale);
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
    const float u = label < 0 ? -INFINITY : score<kSoftcap>(load_element<T>(x + label), scale);
    set.logps[n] = label_logp(others, u, scale);
    if (set.sum == nullptr) return;
    const Share all = with_label(others, u, scale);
    set.maximum[n] = all.maximum;
    set.sum[n] = float(all.sum);
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

// out = f(x) for each element of a block's share of a row, whose vectors are those of out.
template <class T, class Block, class F>
KTO_DEVICE void map(Block& block, const typename T::Element* x, typename T::Element* out,
                    const Line& line, F&& f) {
  constexpr int kCount = kPerVector<T>;
  constexpr int kThreads = Block::kThreads;
  const auto* body = x + line.head;
  auto* out_body = out + line.head;
  // Stores are aligned; loads too where x lies as out does, which it does in place.
  const bool aligned = (reinterpret_cast<uintptr_t>(body) & (sizeof(Vector) - 1)) == 0;
  const auto map_vector = [&](const Vector& vector, int v) {
    float u[kCount];
    unpack<T>(vector, u);
    for (int k = 0; k < kCount; ++k) u[k] = f(u[k]);
    store_vector(out_body + int64_t(v) * kCount, pack<T>(u));
  };
  block.each([&](int thread) {
    if (aligned) {
      walk<kThreads>(
          line, thread,
          [&](int v) {
            Vector vectors[kUnroll];
            for (int k = 0; k < kUnroll; ++k)
              vectors[k] = load_vector<false>(body + int64_t(v + k * kThreads) * kCount);
            for (int k = 0; k < kUnroll; ++k) map_vector(vectors[k], v + k * kThreads);
          },
          [&](int v) { map_vector(load_vector<false>(body + int64_t(v) * kCount), v); });
    } else {
      for (int v = line.first + thread; v < line.last; v += kThreads) {
        float u[kCount];
        for (int k = 0; k < kCount; ++k) u[k] = f(load_element<T>(body + int64_t(v) * kCount + k));
        store_vector(out_body + int64_t(v) * kCount, pack<T>(u));
      }
    }
    for (int i = thread; i < line.edge; i += kThreads) {
      const int v = edge_position<T>(line, i);
      store_element<T>(out + v, f(load_element<T>(x + v)));
    }
  });
}

// g dlogp/dx of a row, or of a block's share of it, over the logits or into another buffer. `sum`
// and `maximum` are of all scores.
template <class T, bool kSoftcap, class Block>
KTO_DEVICE void write_gradient(Block& block, const typename T::Element* x, typename T::Element* out,
                               int64_t label, const Line& line, int split, const Scale& scale,
                               float g, float maximum, float sum, const float* logp) {
  constexpr int kCount = kPerVector<T>;
  const float rate = scale.outer * kLog2e;
  const double slope = double(g) * scale.slope;
  const float factor = float(sum == 0 ? -slope : -slope / sum);
  // Whether the label is in this block's share.
  const int at = int(label) - line.head;
  const bool in_vectors = at >= 0 && at / kCount < line.vectors;
  const bool mine = label >= 0 && (in_vectors ? at / kCount >= line.first && at / kCount < line.last
                                              : split == 0);
  float y = 0;
  if (kSoftcap) {
    if (mine) y = score<kSoftcap>(load_element<T>(x + label), scale);
    block.barrier();  // in place: all have read the label's logit before one overwrites it
  }
  map<T>(block, x, out, line, [&](float x_v) {
    const float u = score<kSoftcap>(x_v, scale);
    const float p = power_of_two((u - maximum) * rate) * factor;
    return kSoftcap ? p * (1.0f - u * u) : p;
  });
  if (!mine) return;
  block.barrier();  // after -g p, which the same block wrote there
  // 1 - p from the log-probability: rounding p first would lose every near-certain token.
  block.once([&] {
    const double entry = slope * -expm1(double(*logp));
    store_element<T>(out + label, float(kSoftcap ? entry * (1 - double(y) * y) : entry));
  });
}

template <class T, bool kSoftcap, class Block>
KTO_DEVICE void backward(Block& block, const BackwardArguments& arguments) {
  constexpr int kCount = kPerVector<T>;
  constexpr int kThreads = Block::kThreads;
  using Element = typename T::Element;
  const Rows& rows = arguments.rows;
  const int64_t n = block.index() / unsigned(arguments.splits);
  const int split = int(block.index() % unsigned(arguments.splits));
  const int64_t label = label_of(rows, n);
  const float g = label == kIgnored ? 0.0f : float(gradient_of(arguments.gradient, rows, n));
  Element* out = static_cast<Element*>(arguments.out) +
                 (rows.tokens == 0 ? n * arguments.out_stride_t
                                   : n / rows.tokens * arguments.out_stride_b +
                                         n % rows.tokens * arguments.out_stride_t);
  const Line line = line_of<T>(out, rows.vocab, split, arguments.splits);
  if (g == 0) {
    Element* out_body = out + line.head;
    block.each([&](int thread) {
      for (int v = line.first + thread; v < line.last; v += kThreads)
        store_vector(out_body + int64_t(v) * kCount, Vector{0, 0, 0, 0});
      for (int i = thread; i < line.edge; i += kThreads) out[edge_position<T>(line, i)] = 0;
    });
    return;
  }
  const Element* x = static_cast<const Element*>(rows.logits) + logits_offset(rows, n);
  write_gradient<T, kSoftcap>(block, x, out, label, line, split, arguments.scale, g,
                              arguments.maximum[n], arguments.sum[n], arguments.logps + n);
}

// A chunk of logits ------------------------------------------------------------------------------

KTO_DEVICE void store_outputs(const ChunkArguments& arguments, int64_t n, const OutputShare& others,
                              const Share& all, float u) {
  const double outer = arguments.scale.outer, reference = all.maximum * outer;
  if (arguments.entropy != nullptr) {
    const double weighted =
        weighted_at<double>(reference, {others.maximum * outer, others.sum}, others.weighted) +
        weighted_at<double>(reference, {u * outer, 1}, 0);
    arguments.entropy[n] = float(entropy<double>(all.sum, weighted));
  }
  if (arguments.mean_logits != nullptr)
    arguments.mean_logits[n] = float(others.total * outer / double(arguments.rows.vocab));
  if (arguments.is_top1 != nullptr)
    arguments.is_top1[n] = others.beaten == 0 && !isnan(arguments.logps[n]);
}

// A row: its scores, and over it the gradient of its log-probability.
template <class T, bool kSoftcap, bool kOutputs, class Block>
KTO_DEVICE void chunk(Block& block, const ChunkArguments& arguments) {
  using Element = typename T::Element;
  const Rows& rows = arguments.rows;
  const Scale& scale = arguments.scale;
  const int64_t n = block.index(), label = label_of(rows, n), offset = logits_offset(rows, n);
  const Element* x = static_cast<const Element*>(rows.logits) + offset;
  const Line line = line_of<T>(x, rows.vocab, 0, 1);
  const auto others = softmax_share<T, kSoftcap, kOutputs, true>(block, x, label, line, scale);
  const Share all = block.broadcast([&] {
    const float u = score<kSoftcap>(load_element<T>(x + label), scale);
    const Share share = with_label(others, u, scale);
    arguments.logps[n] = label_logp(others, u, scale);
    if constexpr (kOutputs) store_outputs(arguments, n, others, share, u);
    return share;
  });
  if (arguments.gradient == nullptr) return;
  Element* out = static_cast<Element*>(arguments.gradient) + offset;
  write_gradient<T, kSoftcap>(block, x, out, label, line, 0, scale, 1, all.maximum, float(all.sum),
                              arguments.logps + n);
}

// In place ---------------------------------------------------------------------------------------

// The blocks take the elements in turns, a step of each thread at a time.
template <class T, class Block>
KTO_DEVICE void multiply(Block& block, const MultiplyArguments& arguments) {
  constexpr int64_t kStep = kUnroll * Block::kThreads * kPerVector<T>;
  const float factor = float(value_at(arguments.factor, 0));
  if (factor == 1) return;
  for (int64_t i = block.index() * kStep; i < arguments.count; i += arguments.blocks * kStep) {
    auto* x = static_cast<typename T::Element*>(arguments.data) + i;
    const int64_t left = arguments.count - i;
    map<T>(block, x, x, line_of<T>(x, left < kStep ? left : kStep, 0, 1),
           [&](float x_i) { return x_i * factor; });
  }
}

// Call body with the elements' type, or with a flag, as a compile-time constant.
template <class Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(Codec<DType::f32>{});
    case DType::f16:
      return body(Codec<DType::f16>{});
    case DType::bf16:
      return body(Codec<DType::bf16>{});
  }
}

template <class Body>
void with_flag(bool flag, Body&& body) {
  if (flag)
    body(std::true_type{});
  else
    body(std::false_type{});
}

template <class Body>
void dispatch(DType dtype, bool softcap, Body&& body) {
  with_type(dtype,
            [&](auto codec) { with_flag(softcap, [&](auto constant) { body(codec, constant); }); });
}

template <class Body>
void dispatch(const ChunkArguments& arguments, Body&& body) {
  dispatch(arguments.rows.dtype, arguments.scale.softcap, [&](auto codec, auto softcap) {
    with_flag(arguments.entropy != nullptr || arguments.mean_logits != nullptr ||
                  arguments.is_top1 != nullptr,
              [&](auto outputs) { body(codec, softcap, outputs); });
  });
}

}  // namespace kto
