// Forward over positions: every row's normaliser, the divergences, the pulls; then the sequences' log-probabilities.
//
// A team (a warp where rows are short, else a CTA, else a cluster) takes one (b, d). Its rows come from DRAM once, for
// the normalisers; what follows reads them again from the caches, in tiles of one vector a thread. Per tile each thread
// first takes its own classes through all components, then each warp whole rows for
//   pull_l = sum_s t(s) p_l(s) / mass(s).
// A row is cut into slices, one to a CTA of a cluster; without clusters one CTA takes them in turn. Sums over slices
// are taken in their order: the same bits on every device.
#pragma once
#include "mixture.cuh"
#include "stream.cuh"

namespace di4c::cuda {

constexpr int kMaxSlices = 8, kMaxSegments = kMaxThreads / kWarp;
constexpr int kRowsAtOnce = 32;

// A row's normaliser before its pieces are put together.
struct Pieces {
  float max[kMaxSlices][kRowsAtOnce][kMaxSegments], sum[kMaxSlices][kRowsAtOnce][kMaxSegments];
};

// Of each of a tile's classes: top, what of teacher and target falls to a unit of mass, and the target's logarithm.
enum { kTops, kTeachers, kTargets, kLogTargets, kFields };
struct Tile {
  alignas(16) float field[kFields][kMaxThreads * kVector];

  // The place of this thread's team.
  __device__ __forceinline__ Field of_team(int which) {
    return {field[which] + threadIdx.y * blockDim.x * kVector};
  }
};

struct PositionShared {
  union {  // one after the other
    Pieces pieces;
    Tile tile;
  };
  float pull[2][kComponents];
  float parts[kParts];
  float scratch[kWarp];
  unsigned arrived;
};

// What a group makes of the piece-th of so many pieces of a row, in every thread.
template <int kDType>
__device__ __forceinline__ Online piece_online(const Row<kDType>& row, int64_t S, int piece, int pieces,
                                               const Group& group) {
  const int64_t length = part_length(S, pieces), begin = piece * length;
  const int64_t n = begin >= S ? 0 : S - begin < length ? S - begin : length;
  if constexpr (kDType == kLogistic) {
    Online mine;
    for (int64_t i = group.rank; i < n; i += group.size) mine.add(row[begin + i]);
    return mine.merged(group);
  } else {
    return slice_online(row, begin, n, group);
  }
}

// KL(t || p) is the sum of t (e^delta - 1 - delta) = p - t - t delta over the classes, delta = log p - log t: no term
// is negative, and an error of a normaliser enters squared. +inf where p = 0 < t.
__device__ __forceinline__ float kl_term(float t, float log_t, float p, float log_p) {
  if (log_p == -INFINITY && log_t > -INFINITY) return INFINITY;
  const float delta = log_p - log_t;
  if (!(fabsf(delta) < 0.5f)) return p - t - (t == 0.0f ? 0.0f : t * delta);
  float tail = 1.0f / 40320.0f;  // of e^delta - 1 - delta over delta^2
  tail = fmaf(tail, delta, 1.0f / 5040.0f);
  tail = fmaf(tail, delta, 1.0f / 720.0f);
  tail = fmaf(tail, delta, 1.0f / 120.0f);
  tail = fmaf(tail, delta, 1.0f / 24.0f);
  tail = fmaf(tail, delta, 1.0f / 6.0f);
  tail = fmaf(tail, delta, 0.5f);
  return t * (delta * delta) * tail;
}

// The same averaged over components whose logs average to mean_log and probabilities to p.
__device__ __forceinline__ float mean_kl_term(float t, float log_t, float p, float mean_log) {
  if (mean_log == -INFINITY && log_t > -INFINITY) return INFINITY;
  return (t == 0.0f ? 0.0f : t * (log_t - mean_log)) + (p - t);
}

// One position of the mixture and what is asked of it.
template <int kDType>
struct Position {
  const MixtureArgs& p;
  int64_t b, d;
  Components<kDType> logits;
  TargetComponents<kDType> teacher, target;
  bool used, has_teacher, has_target, distils;

  __device__ __forceinline__ Position(const MixtureArgs& a, int64_t b_, int64_t d_)
      : p(a), b(b_), d(d_), logits(a.logits, a.lse, a.B, a.L, a.D, a.S, b_, d_),
        teacher(a.teacher, a.lse_teacher, a.B, 1, a.D, a.S, b_, d_),
        target(a.target, a.lse_target, a.B, a.T, a.D, a.S, b_, d_) {
    const bool inside = a.inside != nullptr && a.inside[b] != 0;
    used = weight_at(a.weight, b, a.D, d) != 0.0f;
    has_teacher = a.teacher.data != nullptr;
    has_target = a.T > 0 && !inside;
    distils = has_teacher && (inside || a.inside == nullptr);
  }

  // Whether rows are to be read again, after their normalisers.
  __device__ __forceinline__ bool diverges() const { return used && (has_teacher || has_target || p.information); }

  // Rows to be read: the logits', the teacher's, the target's.
  __device__ __forceinline__ int64_t rows() const { return p.L + has_teacher + (has_target ? p.T : 0); }

  template <class F>
  __device__ __forceinline__ void with_row(int64_t r, F f) const {
    if (r < p.L) {
      f(logits.row(r));
    } else {
      const bool of_teacher = has_teacher && r == p.L;
      const auto row = of_teacher ? teacher.row(0) : target.row(r - p.L - has_teacher);
      if constexpr (kDType == kLogistic) {
        f(row);
      } else {
        row.typed(f);
      }
    }
  }

  __device__ __forceinline__ void keep(int64_t r, const Norm& norm) const {
    if (r < p.L) {
      norm.keep(p.lse, logits.plane, logits.index(r));
    } else if (has_teacher && r == p.L) {
      norm.keep(p.lse_teacher, teacher.plane, teacher.index(0));
    } else {
      norm.keep(p.lse_target, target.plane, target.index(r - p.L - has_teacher));
    }
  }

  // 0 in all that is kept of rows that are not read.
  __device__ __forceinline__ void keep_unread(int rank, int size) const {
    if (!used) {
      for (int64_t l = rank; l < p.L; l += size) Norm{}.keep(p.lse, logits.plane, logits.index(l));
      if (has_teacher && rank == 0) Norm{}.keep(p.lse_teacher, teacher.plane, teacher.index(0));
    }
    if (!used || !has_target) {
      for (int64_t t = rank; t < p.T; t += size) Norm{}.keep(p.lse_target, target.plane, target.index(t));
    }
  }

  // Where the target's plane of pulls starts: after the teacher's, where there is one.
  __device__ __forceinline__ int64_t target_pull() const {
    return p.teacher.data == nullptr ? 0 : logits.plane;
  }

  __device__ __forceinline__ void keep_pull(int64_t l, float by_teacher, float by_target) const {
    if (p.teacher.data != nullptr) p.pull[logits.index(l)] = by_teacher;
    if (p.T > 0) p.pull[target_pull() + logits.index(l)] = by_target;
  }

  __device__ __forceinline__ void keep_part(int part, float value) const { p.row[(part * p.B + b) * p.D + d] = value; }

  // Slots of kN classes each: their divergences added to `sums`, the pulls by them to `pull` (teacher's, target's,
  // `stride` apart).
  template <int kN, class ClassOf>
  __device__ __forceinline__ void divergences(const Group& team, Tile& tile, int slots, ClassOf class_of,
                                              float (&sums)[kParts], float* pull, int stride) const {
#pragma unroll 1
    for (int i = team.rank; i < slots; i += team.size) classes<kN>(tile, i, class_of(i), sums);
    if (!has_teacher && !has_target) return;
    team.sync();
    const Field tops = tile.of_team(kTops), teachers = tile.of_team(kTeachers);
    const Field targets = tile.of_team(kTargets);
#pragma unroll 1
    for (int l = team.rank / kWarp; l < static_cast<int>(p.L); l += team.size / kWarp) {
      const auto row = logits.row(l);
      const Norm norm = logits.norm(l);
      float of_teacher = 0.0f, of_target = 0.0f;
#pragma unroll 2
      for (int i = team.rank % kWarp; i < slots; i += kWarp) {
        float x[kN], v[kN];
        row.load(class_of(i), x);
        tops.get(i, v);
#pragma unroll
        for (int j = 0; j < kN; ++j) x[j] = exp_quick(norm.log_prob(x[j]) - v[j]);
        if (has_teacher) {
          teachers.get(i, v);
#pragma unroll
          for (int j = 0; j < kN; ++j) of_teacher = fmaf(v[j], x[j], of_teacher);
        }
        if (has_target) {
          targets.get(i, v);
#pragma unroll
          for (int j = 0; j < kN; ++j) of_target = fmaf(v[j], x[j], of_target);
        }
      }
      of_teacher = warp_sum(of_teacher);
      of_target = warp_sum(of_target);
      if (team.rank % kWarp == 0) {
        pull[l] += of_teacher;
        pull[stride + l] += of_target;
      }
    }
    team.sync();  // the tile is written again
  }

  // One thread's part of it: the classes of slot i, from s on, through all components. The target comes first, and
  // waits in the tile: not everything fits into registers at once.
  template <int kN>
  __device__ __forceinline__ void classes(Tile& tile, int i, int64_t s, float (&sums)[kParts]) const {
    const Field targets = tile.of_team(kTargets), log_targets = tile.of_team(kLogTargets);
    const float count = static_cast<float>(p.L), log_count = logf(count);
    float t[kN], log_t[kN], log_mean[kN];
    if (has_target) {
      target_of(target, s, t, log_t);
      targets.put(i, t);
      log_targets.put(i, log_t);
    }
    Mass<kN> mass;
    logits.mass(s, mass);
    tile.of_team(kTops).put(i, mass.top);
#pragma unroll
    for (int j = 0; j < kN; ++j) log_mean[j] = mass.log_mean(j, log_count);
    const auto of_mass = [&](const Field& field) {
#pragma unroll
      for (int j = 0; j < kN; ++j) t[j] = mass.sum[j] == 0.0f ? 0.0f : t[j] / mass.sum[j];
      field.put(i, t);
    };
    if (has_teacher) {
      teacher_of(teacher, s, t, log_t);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float mean = exp_quick(log_mean[j]);
        sums[kMarginalTeacher] += kl_term(t[j], log_t[j], mean, log_mean[j]);
        if (distils) sums[kDistillation] += mean_kl_term(t[j], log_t[j], mean, mass.logs[j] / count);
      }
      of_mass(tile.of_team(kTeachers));
    }
    if (has_target) {
      targets.get(i, t);
      log_targets.get(i, log_t);
#pragma unroll
      for (int j = 0; j < kN; ++j)
        sums[kMarginalTarget] += kl_term(t[j], log_t[j], exp_quick(log_mean[j]), log_mean[j]);
      of_mass(targets);
    }
    if (p.information) {
      logits.log_prob(0, s, log_t);
#pragma unroll
      for (int j = 0; j < kN; ++j)
        sums[kInformation] += kl_term(exp_quick(log_t[j]), log_t[j], exp_quick(log_mean[j]), log_mean[j]);
    }
  }

  // Slice c of the row, tile by tile.
  __device__ __forceinline__ void slice(const Group& team, Tile& tile, int c, int slices, float (&sums)[kParts],
                                        float* pull, int stride) const {
    const Cut<kDType> cut(logits.row(0).head(p.S), p.S);
    const int64_t length = ceil_div(cut.vectors, slices), begin = c * length;
    const int64_t end = begin + length < cut.vectors ? begin + length : cut.vectors;
    if constexpr (kDType != kLogistic) {
      constexpr int kHalves = kVector / kHalf;
      for (int64_t v = begin; v < end; v += team.size) {
        const int slots = kHalves * static_cast<int>(end - v < team.size ? end - v : team.size);
        const int64_t s = cut.vector(v);
        divergences<kHalf>(team, tile, slots, [&](int64_t i) { return s + i * kHalf; }, sums, pull, stride);
      }
    }
    const int most = team.size * kVector;
    for (int64_t first = 0; c == 0 && first < cut.loose; first += most) {
      const int slots = static_cast<int>(cut.loose - first < most ? cut.loose - first : most);
      divergences<1>(team, tile, slots, [&](int64_t i) { return cut.single(first + i); }, sums, pull, stride);
    }
  }
};

}  // namespace di4c::cuda
