// The kernels' bodies, for the GPU and for the host's emulation of a block. A block scores one row
// of logits, or one share of a row where rows are few.
//
// Each thread reads the logits in vectors of 16 bytes, kUnroll of them at a time. A row may start
// at any address: the elements in front of the row's first aligned address and behind its last
// whole vector (the edge) are read one by one. Values for each logit and the gradient's factors are
// fp32, sums over rows and sequences fp64.
#pragma once

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "host.h"
#endif

namespace kto {

constexpr int kUnroll = 4;
constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.69314718055994531f;
// A running origin starts here, lower than any finite score: from -inf, -inf - (-inf) would be NaN.
constexpr float kLowest = -3.4028234663852886e38f;
// The moment's terms w 2^w take no lower w than this: 2^w is 0 here already, and w 2^w would be NaN
// at -inf.
constexpr float kVanished = -256;
// A higher |origin * rate| would leave no bits to its rounding error, see exponents_from.
constexpr float kFar = 1 << 30;

// Scores --------------------------------------------------------------------------------------

// tanh to a few units in the last place, near 0 too: a polynomial (Cephes' tanhf) below 0.625, an
// exponential above. CUDA's tanhf branches, which would keep loads from overlapping.
KTO_DEVICE float hyperbolic_tangent(float x) {
  const float a = fabsf(x), z = x * x;
  const float far = 1 - divide(2, power_of_two(a * float(2 * kLog2e)) + 1);
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

// The whole vectors of a row, and the share of them that a block reads.
struct Line {
  int head,
      vectors;      // how many elements lie in front of the vectors, and how many vectors there are
  int first, last;  // the block's share: vectors [first, last)
  int edge;         // how many elements in no vector the block reads: all of them, or 0
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

// The position in the row of the edge's i-th element.
template <class T>
KTO_DEVICE int edge_position(const Line& line, int i) {
  return i < line.head ? i : i + line.vectors * kPerVector<T>;
}

// A thread's way through its vectors: whole(v) for each step of kUnroll vectors, whose first one is
// v, then single(v) for each vector that is left.
template <int kThreads, class Whole, class Single>
KTO_DEVICE void walk(const Line& line, int thread, Whole&& whole, Single&& single) {
  int v = line.first + thread;
  for (; v < line.last - (kUnroll - 1) * kThreads; v += kUnroll * kThreads) whole(v);
  for (; v < line.last; v += kThreads) single(v);
}

// Exponents -----------------------------------------------------------------------------------

KTO_DEVICE float rate_of(const Scale& scale) { return scale.outer * float(kLog2e); }

// The exponent of a score u is slope * u - shift, one instruction: (u - origin) * rate plus the
// rounding error of the shift, the same for all scores.
struct Exponents {
  float slope, shift;
  KTO_DEVICE float of(float u) const { return fmaf(u, slope, -shift); }
};

// Where |origin * rate| is so high that the rounding error would leave fp32's exponents, two scores
// differ by more exponents than fp32 has, or not at all: there the slope is a power of two, 2^31
// over the origin's own, which rounds nothing.
KTO_DEVICE Exponents exponents_from(float origin, float rate) {
  float steep;
  Codec<DType::f32>::unpack(0x8e800000u - (Codec<DType::f32>::pack(&origin) & 0x7f800000u), &steep);
  const float slope = fabsf(origin * rate) > kFar ? steep : rate;
  return {slope, rounded_product(origin, slope)};
}

// By how much (<= 0) exponents change where the origin rises from low to high.
KTO_DEVICE float rise(float low, float high, float rate) {
  const bool far = fmaxf(fabsf(low * rate), fabsf(high * rate)) > kFar;
  const float step = exponents_from(low, rate).shift - exponents_from(high, rate).shift;
  return low == high ? 0 : far ? kVanished : fmaxf(step, kVanished);
}

// The excess of exponents, exactly, for a finite origin.
KTO_DEVICE float offset_of(float origin, float rate) {
  return exponents_from(origin, rate).of(origin);
}

// 2^offset. The instruction is exact to 2^-22 only: near 0, where most offsets are, a series is
// better.
KTO_DEVICE float power_of_offset(float offset) {
  const float x = offset * kLn2;
  return fabsf(x) < 1e-3f ? fmaf(x, fmaf(x, 0.5f, 1), 1) : power_of_two(offset);
}

// log(1 + x) for x >= 0, to about 2^-26 of it, where `near` is 1 + x in fp32, m 2^k with m around
// 1: fp32 knows the logarithm of m well, and the rest of 1 + x is small.
KTO_DEVICE double log_1p(double x, float near) {
  const float rest = float(x - (near - 1));
  const int bits = int(Codec<DType::f32>::pack(&near)), k = (bits - 0x3f3504f3) >> 23;  // 1/sqrt(2)
  float m;
  Codec<DType::f32>::unpack(uint32_t(bits) - (uint32_t(k) << 23), &m);
  const float f = m - 1, s = divide(f, m + 1), z = s * s;
  float series = fmaf(0.2222222222f, z, 0.2857142857f);  // of 2 artanh(s)
  series = z * fmaf(fmaf(series, z, 0.4f), z, 0.6666666667f);
  return fma(double(k), 0.69314718055994531, double(f - (s * (f - series) - divide(rest, near))));
}

// exp(x) - 1 for x <= 0: a series near 0, where the difference would lose its digits.
KTO_DEVICE float exp_minus_1(float x) {
  float series = fmaf(x, 0.0005952380952f, 0.004761904762f);
  series = fmaf(x, fmaf(x, fmaf(x, series, 0.03333333333f), 0.2f), 1);
  series = fmaf(x, fmaf(x, 0.04166666667f * series, 0.1666666667f), 0.5f);
  return x > -0.5f ? fmaf(x * x, series, x) : power_of_two(x * float(kLog2e)) - 1;
}

// The forward -----------------------------------------------------------------------------------

// The softmax of the scores that a thread has read, without the label's. The members after the sum
// are used with kOutputs alone.
struct Running {
  float origin, sum;
  float moment;  // sum of w 2^w, where `sum` is that of 2^w
  float total;   // sum of the scores, with the label's
  bool
      beaten;  // the label is not the first argmax: another logit is higher, or earlier and as high
};

// Adds two shares of one origin.
KTO_DEVICE Share operator+(const Share& a, const Share& b) { return {a.sum + b.sum, a.origin}; }

KTO_DEVICE Share merge(const Share& a, const Share& b, const Scale& scale) {
  const float rate = rate_of(scale), origin = fmaxf(a.origin, b.origin);
  return {a.sum * power_of_two((a.origin - origin) * rate) +
              b.sum * power_of_two((b.origin - origin) * rate),
          origin};
}

// A share with the sums that the outputs need.
struct OutputShare : Share {
  float moment;  // sum of w 2^w
  float total;
  float beaten;  // how many threads have `beaten` set
};

KTO_DEVICE OutputShare operator+(const OutputShare& a, const OutputShare& b) {
  return {static_cast<const Share&>(a) + b, a.moment + b.moment, a.total + b.total,
          a.beaten + b.beaten};
}

// Moves the statistics to an origin that is not lower.
template <bool kOutputs>
KTO_DEVICE void raise(float origin, Running& running, float rate) {
  const float w = rise(running.origin, origin, rate);
  const float factor = power_of_two(w);
  if (kOutputs) running.moment = fmaf(w, running.sum, running.moment) * factor;
  running.sum *= factor;
  running.origin = origin;
}

// Folds scores into a running softmax. Only NaN or +inf among them can make it NaN, as the origin
// is never -inf.
template <int kCount, bool kOutputs>
KTO_DEVICE void fold(const float* u, Running& running, float rate) {
  float origin = running.origin;
  for (int k = 0; k < kCount; ++k) origin = fmaxf(origin, u[k]);
  raise<kOutputs>(origin, running, rate);
  const Exponents exponents = exponents_from(origin, rate);
  float sums[2] = {running.sum, 0}, moments[2] = {running.moment, 0};
  for (int k = 0; k < kCount; ++k) {
    const float w = exponents.of(u[k]), power = power_of_two(w);
    sums[k % 2] += power;
    if (kOutputs) moments[k % 2] = fmaf(fmaxf(w, kVanished), power, moments[k % 2]);
  }
  running.sum = sums[0] + sums[1];
  running.moment = moments[0] + moments[1];
}

// The softmax of a block's share of a row, without the label: a Share or, with kOutputs, an
// OutputShare, which thread 0 alone gets. kAgain: the kernel will read the row once more.
template <class T, bool kSoftcap, bool kOutputs, bool kAgain, class Block>
KTO_DEVICE auto softmax_share(Block& block, const typename T::Element* x, int64_t label,
                              const Line& line, const Scale& scale) {
  constexpr int kCount = kPerVector<T>;
  const float rate = rate_of(scale);
  const typename T::Element* body = x + line.head;
  // -1 for a label in the head: division alone would find it in vector 0.
  const int at = int(label) - line.head;
  const int label_vector = at < 0 ? -1 : at / kCount;
  // For top-1, logits are compared, as different ones may have the same score under a softcap.
  // `above` is the lowest number higher than the label's logit y.
  const float y = kOutputs ? load_element<T>(x + label) : 0;
  const float above = y < INFINITY ? nextafterf(y, INFINITY) : NAN;
  // Makes a vector's logits scores, and updates what outputs need.
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
          // One test a step, which all threads pass in the label's step: one of them has the label.
          const int from_v = at - v * kCount;
          if (unsigned(from_v) < unsigned(kUnroll * Block::kThreads * kCount))
            for (int k = 0; k < kUnroll * kCount; ++k)
              u[k] =
                  from_v == k / kCount * Block::kThreads * kCount + k % kCount ? -INFINITY : u[k];
          fold<kUnroll * kCount, kOutputs>(u, running, rate);
        },
        [&](int v) {
          float u[kCount];
          scores(load_vector<kAgain>(body + int64_t(v) * kCount), v, u, running);
          const int from_v = at - v * kCount;
          if (unsigned(from_v) < unsigned(kCount))
            for (int k = 0; k < kCount; ++k) u[k] = k == from_v ? -INFINITY : u[k];
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
  const auto share_at = [&](Running running, float origin) {
    raise<kOutputs>(origin, running, rate);
    const float offset = offset_of(origin, rate), back = power_of_offset(-offset);
    const Share share = {running.sum * back, origin};
    if constexpr (kOutputs)
      return OutputShare{share, fmaf(-offset, running.sum, running.moment) * back, running.total,
                         running.beaten ? 1.0f : 0.0f};
    else
      return share;
  };
  return block.softmax(thread_softmax, share_at);
}

// The statistics of all other scores, joined with the label's score y.
struct LabelScore {
  float logp;
  float origin, sum;  // the statistics of all scores
  float log_sum;
  bool ahead;        // the label is the maximum
  float d, decayed;  // the exponent d <= 0 of the lower of label and others, and 2^d
};

// Stage token_logps. log1p of the others is exact where the label is the maximum, as it is for most
// tokens of a good completion.
KTO_DEVICE LabelScore label_score(const Share& others, float y, const Scale& scale) {
  const float others_sum = float(others.sum), highest = others_sum == 0 ? -INFINITY : others.origin;
  LabelScore found;
  found.ahead = y >= highest;
  const double gap = (double(y) - double(highest)) * scale.outer;
  // d to 48 bits: in fp32 alone its rounding would show in 2^d.
  const double d = -fabs(gap) * kLog2e;
  found.d = fmaxf(float(d), kVanished);
  const float rest = float(d - found.d);
  found.decayed = found.d > kVanished ? power_of_two(found.d) * fmaf(rest, kLn2, 1) : 0;
  // At the higher one's origin: 1, and beside it what the lower one decayed to, or all but 1 of the
  // others.
  const double beside = fma(others.sum, double(found.ahead ? found.decayed : 1),
                            double(found.ahead ? 0 : found.decayed - 1));
  found.sum = float(1 + beside);
  const double log_sum = log_1p(beside, found.sum);
  found.log_sum = float(log_sum);
  found.logp = float((found.ahead ? 0 : gap) - log_sum);
  if (y == -INFINITY) {
    found.logp = y;
    found.sum = others_sum;
  }
  if (isnan(others_sum) || isnan(y) || y == INFINITY) found.logp = found.sum = NAN;
  found.origin = fmaxf(others.origin, y);
  return found;
}

// Scores row n of a set, or a block's share of it. Returns whether this block is the last of the
// row's blocks, which alone writes the row's results.
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
        if (set.sum != nullptr) set.origin[n] = set.sum[n] = 0;
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
      for (int i = 1; i < splits; ++i) others = merge(others, shares[i], scale);
    });
  }
  block.once([&] {
    const float u = label < 0 ? -INFINITY : score<kSoftcap>(load_element<T>(x + label), scale);
    const LabelScore found = label_score(others, u, scale);
    set.logps[n] = found.logp;
    if (set.sum == nullptr) return;
    set.origin[n] = found.origin;
    set.sum[n] = found.sum;
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

// Stage sequence_logps of one set: each warp sums sequences of its own.
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
        sum += difference(value_at(stages.kl_logps, j), stages.ref_kl_logps.data == nullptr
                                                            ? 0.0
                                                            : value_at(stages.ref_kl_logps, j));
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
  const double factor =
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
      stages.coefficients[i] = float(loss.slope * factor / tokens);
      if (stages.reduction == Reduction::none) stages.loss[i] = float(loss.loss);
      sum += loss.loss;
    }
    return sum;
  });
  block.once([&] {
    *stages.kl_out = float(z0);
    if (stages.reduction != Reduction::none) *stages.loss = float(total * factor);
  });
}

struct Largest {
  double value;
};
KTO_DEVICE Largest operator+(const Largest& a, const Largest& b) {
  return {a.value > b.value ? a.value : b.value};
}

// The stages of sequences that are closed together, by one block.
template <class Block>
KTO_DEVICE void sequences(Block& block, const SequencesArguments& arguments) {
  const int64_t count = arguments.n_sequences;
  const double* sums = arguments.sums;
  if (sums == nullptr) {
    sums = arguments.logps;
    block.template sums<Tally>(
        count,
        [&](int64_t i, int lane, int lanes) -> Tally {
          Tally tally = {0, 0};
          for (int64_t n = arguments.offsets[i] + lane; n < arguments.offsets[i + 1]; n += lanes)
            tally.sum += arguments.token_logps[n];
          return tally;
        },
        [&](int64_t i, const Tally& tally) { arguments.logps[i] = tally.sum; });
  }
  const double z0 = value_at(arguments.z0, 0);
  block.each([&](int thread) {
    KTO_ROLLED
    for (int64_t i = thread; i < count; i += Block::kThreads) {
      double tokens = 1;
      if (arguments.average)
        tokens = fmax(
            1.0, arguments.counts == nullptr ? double(arguments.lengths[i]) : arguments.counts[i]);
      const double logp = sums[i] / tokens;
      if (arguments.logps != nullptr) arguments.logps[i] = logp;
      const double log_ratio = arguments.ref_logps.data == nullptr
                                   ? logp
                                   : difference(logp, value_at(arguments.ref_logps, i));
      const SequenceLoss loss = sequence_loss(
          log_ratio, z0, arguments.desirable[i * arguments.desirable_stride], arguments.options);
      arguments.slopes[i] = loss.slope / arguments.reduced_by / tokens;
      if (arguments.losses == nullptr) continue;
      arguments.losses[i] = loss.loss;
      arguments.rewards[i] = arguments.options.beta * log_ratio;
    }
  });
  if (arguments.divisor == nullptr) return;
  block.barrier();  // other threads have stored the slopes
  block.template sums<Largest>(
      1,
      [&](int64_t, int lane, int lanes) -> Largest {
        Largest largest = {0};
        KTO_ROLLED
        for (int64_t i = lane; i < count; i += lanes) {
          const double size = fabs(arguments.slopes[i]);  // NaN counts as infinite
          if (arguments.lengths[i] > 0) largest = largest + Largest{isnan(size) ? INFINITY : size};
        }
        return largest;
      },
      [&](int64_t, const Largest& largest) {
        const double before = *arguments.divisor;
        const double now = fmax(before, power_of_two_below(largest.value));
        *arguments.divisor = now;
        *arguments.factor = before / now;
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
  // Without any row there is still one block, which does the stages of the (empty) sequences.
  if (block.arrive(arguments.arrivals, arguments.n_rows > 1 ? arguments.n_rows : 1))
    sequence_stages(block, arguments);
}

// The gradient ----------------------------------------------------------------------------------

// Writes f(x) to out for each element of a block's share of a row. `line` describes the vectors of
// out.
template <class T, class Block, class F>
KTO_DEVICE void map(Block& block, const typename T::Element* x, typename T::Element* out,
                    const Line& line, F&& f) {
  constexpr int kCount = kPerVector<T>;
  constexpr int kThreads = Block::kThreads;
  const auto* body = x + line.head;
  auto* out_body = out + line.head;
  // Stores are aligned. Loads are too where x begins at as aligned an address, as it does in place.
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

// Writes g times the gradient of the label's log-probability, for a row or a block's share of it,
// to the logits or to another buffer. `origin` and `sum` are the statistics of the whole row.
template <class T, bool kSoftcap, class Block>
KTO_DEVICE void write_gradient(Block& block, const typename T::Element* x, typename T::Element* out,
                               int64_t label, const Line& line, int split, const Scale& scale,
                               float g, float origin, float sum, const float* logp) {
  constexpr int kCount = kPerVector<T>;
  const float rate = rate_of(scale);
  const Exponents exponents = exponents_from(origin, rate);
  const float upstream = g * scale.slope;
  const float factor =
      -divide(upstream, sum == 0 ? 1 : sum) * power_of_offset(-offset_of(origin, rate));
  // Whether the label is in this block's share.
  const int at = int(label) - line.head;
  const bool in_vectors = at >= 0 && at / kCount < line.vectors;
  const bool mine = label >= 0 && (in_vectors ? at / kCount >= line.first && at / kCount < line.last
                                              : split == 0);
  float y = 0;
  if (kSoftcap) {
    if (mine) y = score<kSoftcap>(load_element<T>(x + label), scale);
    block.barrier();  // in place, a thread may overwrite the label's logit: all have read it by now
  }
  map<T>(block, x, out, line, [&](float x_v) {
    const float u = score<kSoftcap>(x_v, scale);
    const float p = power_of_two(exponents.of(u)) * factor;
    return kSoftcap ? p * (1.0f - u * u) : p;
  });
  if (!mine) return;
  block.barrier();  // the label's entry is written over -g p, which this block has written to it
  // 1 - p is computed from the log-probability: rounding p first would lose its digits for every
  // near-certain token.
  block.once([&] {
    const float entry = upstream * -exp_minus_1(*logp);
    store_element<T>(out + label, kSoftcap ? entry * ((1 - y) * (1 + y)) : entry);
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
                              arguments.origin[n], arguments.sum[n], arguments.logps + n);
}

// A chunk of logits ------------------------------------------------------------------------------

KTO_DEVICE void store_outputs(const ChunkArguments& arguments, int64_t n, const OutputShare& others,
                              const LabelScore& label) {
  if (arguments.entropy != nullptr) {
    // No term is negative: no digits are lost.
    const float moment = label.ahead
                             ? fmaf(float(others.sum), label.d, others.moment) * label.decayed
                             : fmaf(label.decayed, label.d, others.moment);
    arguments.entropy[n] = label.sum == 0 ? 0 : label.log_sum - divide(moment * kLn2, label.sum);
  }
  if (arguments.mean_logits != nullptr)
    arguments.mean_logits[n] = others.total * arguments.scale.outer / float(arguments.rows.vocab);
  if (arguments.is_top1 != nullptr) arguments.is_top1[n] = others.beaten == 0 && !isnan(label.logp);
}

// Scores one row of a chunk and, if asked to, overwrites the row by the gradient of its label's
// log-probability.
template <class T, bool kSoftcap, bool kOutputs, class Block>
KTO_DEVICE void chunk(Block& block, const ChunkArguments& arguments) {
  using Element = typename T::Element;
  const Rows& rows = arguments.rows;
  const Scale& scale = arguments.scale;
  const int64_t n = block.index(), label = label_of(rows, n), offset = logits_offset(rows, n);
  const Element* x = static_cast<const Element*>(rows.logits) + offset;
  const Line line = line_of<T>(x, rows.vocab, 0, 1);
  const auto others = softmax_share<T, kSoftcap, kOutputs, true>(block, x, label, line, scale);
  const LabelScore all = block.broadcast([&] {
    const float u = score<kSoftcap>(load_element<T>(x + label), scale);
    const LabelScore found = label_score(others, u, scale);
    arguments.logps[n] = found.logp;
    if constexpr (kOutputs) store_outputs(arguments, n, others, found);
    return found;
  });
  if (arguments.gradient == nullptr) return;
  Element* out = static_cast<Element*>(arguments.gradient) + offset;
  write_gradient<T, kSoftcap>(block, x, out, label, line, 0, scale, 1, all.origin, all.sum,
                              arguments.logps + n);
}

// In place ---------------------------------------------------------------------------------------

// Multiplies all elements by the factor. The blocks take turns, one step of all their threads each.
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

// These call body with the elements' type or with a flag as a compile-time constant.
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
