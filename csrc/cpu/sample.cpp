// sample: one word per row by Gumbel-max from counter-based noise, under top-k and top-p, and its logprob.
//
// The arithmetic is defined in hpsafety/reference/sample.py and repeated here to the bit, so that every backend draws
// the same words: plain fp32 additions and multiplications in that order (the file is compiled with -ffp-contract=off;
// nothing here may become std::fma, std::log or exp_u20), integer sums, ties by index. Nothing depends on the order of
// work, and therefore not on threads or vector width.
//
// Limit: Philox, about 3 instructions a word, not the bytes. A row is read from memory once, for the maxima of its
// groups of 128 words, and stays in the L2 cache for the two passes that follow. Both skip what cannot matter, exactly:
// groups whose masses all round to 0; groups that even the largest noise would not lift above the best score so far,
// before their Philox; and words that a cheap upper bound of their noise would not, before their two logarithms (about
// a dozen words a row are left). top-p and top-k select over integer keys of a few candidates; nothing is sorted.

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "common.h"
#include "sample_arithmetic.h"

namespace hpsafety {
namespace {

using namespace sampling;

constexpr int64_t kGrain = 32;  // groups that are worth a thread
constexpr int64_t kMaxWords = int64_t{1} << 23;
constexpr float kInf = std::numeric_limits<float>::infinity();

// ---- one row ----

struct Settings {
  float scale;    // log2(e) / temperature
  int64_t top_k;  // V: off
  int64_t top_p;  // in 2^-31, 2^31: off
  bool greedy;
};

template <typename T>
struct Row {
  const T* logits;
  int64_t v, groups;
  float top = 0, scale = 1;  // the largest logit, and what makes bits of a difference to it

  // Words 128 g and on as fp32, -inf past the end; in place when they are.
  const float* group(int64_t g, float* buffer) const {
    const T* source = logits + g * kGroup;
    const int64_t n = std::min(kGroup, v - g * kGroup);
    if constexpr (std::is_same_v<T, float>) {
      if (n == kGroup) return source;
    }
    for_lanes(n, [&](int64_t i, int64_t lanes) { store_lanes(buffer + i, load_lanes(source + i, lanes), lanes); });
    std::fill(buffer + n, buffer + kGroup, -kInf);
    return buffer;
  }
  float y(float x) const { return (x - top) * scale; }
  float at(int64_t i) const { return static_cast<float>(logits[i]); }
};

template <typename T>
void group_maxima(const Row<T>& row, float* maxima) {  // NaN stays
  at::parallel_for(0, row.groups, kGrain, [&](int64_t begin, int64_t end) {
    float buffer[kGroup];
    for (int64_t g = begin; g < end; ++g) {
      const float* x = row.group(g, buffer);
      maxima[g] = at::vec::reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, x, kGroup);
    }
  });
}

template <typename T>
int64_t total_mass(const Row<T>& row, const float* maxima) {
  std::atomic<int64_t> total = 0;
  at::parallel_for(0, row.groups, kGrain, [&](int64_t begin, int64_t end) {
    float buffer[kGroup];
    int64_t sum = 0;
    for (int64_t g = begin; g < end; ++g) {
      if (row.y(maxima[g]) < kNoMass) continue;
      const float *x = row.group(g, buffer), top = row.top, scale = row.scale;
      for (int64_t i = 0; i < kGroup; ++i) sum += mass((x[i] - top) * scale);
    }
    total += sum;
  });
  return total;
}

// ---- top-k and top-p ----

// The last allowed word in the order of logits downwards, equals by index upwards.
struct Border {
  float logit = -kInf;
  int64_t index = std::numeric_limits<int64_t>::max();
  bool allows(float x, int64_t i) const { return x > logit || (x == logit && i <= index); }
};

struct Candidates {  // in order of index
  std::vector<float> logit;
  std::vector<int32_t> index;
  std::vector<int64_t> weight;
  int64_t n = 0;
  void reserve(int64_t size) {
    if (static_cast<int64_t>(logit.size()) < size) logit.resize(size), index.resize(size), weight.resize(size);
  }
  void move(int64_t from, int64_t to) { logit[to] = logit[from], index[to] = index[from], weight[to] = weight[from]; }
};

// Logarithm of the number of buckets for n words: enough to leave few of them in one, up to 16 KB of L1.
inline int bucket_bits(int64_t n) { return std::clamp<int>(std::bit_width(static_cast<uint64_t>(n)), 4, 11); }

struct Scratch {
  std::vector<float> maxima, sorted;
  std::vector<int64_t> histogram;
  Candidates candidates;
};

// The bucket in which the weights, added up from the first, reach target; what is left of target in it; the last bucket
// where they do not.
inline int32_t find_bucket(const std::vector<int64_t>& sums, int64_t& target) {
  const int32_t last = static_cast<int32_t>(sums.size()) - 1;
  int32_t bucket = 0;
  while (bucket < last && target > sums[bucket]) target -= sums[bucket++];
  return bucket;
}

// Unsigned integers in the order of the floats.
inline uint32_t to_key(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.f);  // -0 becomes 0
  return static_cast<uint32_t>(bits ^ ((bits >> 31) | std::numeric_limits<int32_t>::min()));
}

// The border of the smallest set of leading candidates whose weight reaches target (at most the sum of the weights,
// at least 1). Radix select over the keys: buckets between the largest and the smallest one left, then within one.
Border select(Candidates& c, int64_t target, std::vector<int64_t>& sums) {
  uint32_t low = ~0u, top = 0;
  for (int64_t i = 0; i < c.n; ++i) low = std::min(low, to_key(c.logit[i])), top = std::max(top, to_key(c.logit[i]));
  for (int shift = 1; shift > 0 && c.n > 1;) {
    const int bits = bucket_bits(c.n);
    shift = std::max(0, static_cast<int>(std::bit_width(top - low)) - bits);
    sums.assign(size_t{1} << bits, 0);
    for (int64_t i = 0; i < c.n; ++i) sums[(top - to_key(c.logit[i])) >> shift] += c.weight[i];
    const uint32_t bucket = find_bucket(sums, target);
    int64_t n = 0;
    for (int64_t i = 0; i < c.n; ++i) {
      const bool inside = (top - to_key(c.logit[i])) >> shift == bucket;
      c.move(i, n);
      n += inside;
    }
    c.n = n;
    top -= bucket << shift;
    low = std::max(low, top - ((1u << shift) - 1));
  }
  int64_t i = 0;  // equals: as many as are needed, by index
  while (target > c.weight[i]) target -= c.weight[i++];
  return {c.logit[i], c.index[i]};
}

// Appends the words of groups whose maximum fits, for which keep(x, i, flags) sets flags.
template <typename T, typename Keep>
void collect(const Row<T>& row, float least_y, Scratch& scratch, Keep&& keep) {
  Candidates& c = scratch.candidates;
  float buffer[kGroup];
  int32_t flags[kGroup];
  c.n = 0;
  for (int64_t g = 0; g < row.groups; ++g) {
    if (!(row.y(scratch.maxima[g]) >= least_y)) continue;
    const float* x = row.group(g, buffer);
    const int64_t words = std::min(kGroup, row.v - g * kGroup);
    int32_t any = 0;
    for (int64_t i = 0; i < kGroup; ++i) any |= flags[i] = keep(x[i]);
    if (!any) continue;
    c.reserve(c.n + kGroup);
    for (int64_t i = 0; i < words; ++i) {
      c.logit[c.n] = x[i], c.index[c.n] = static_cast<int32_t>(g * kGroup + i);
      c.n += flags[i];
    }
  }
}

// The border of the smallest set of leading words of the row whose weight, weight(y), reaches target. The words are
// first put into buckets of equal width in y down to least_y, the last of which takes everything below; then those of
// the one bucket that matters are selected among. least_y is a guess: a good one spares work, a bad one costs no more.
template <typename T, typename Weight>
Border select_row(const Row<T>& row, int64_t target, float least_y, Scratch& scratch, Weight&& weight) {
  least_y = std::clamp(least_y, -1000.f, -0.001f);
  const int32_t last = (1 << bucket_bits(row.v)) - 1;
  const float per_y = last / -least_y, last_as_float = last, top = row.top, scale = row.scale;
  const auto bucket_of = [=](float x) {
    return static_cast<int32_t>(nearer_to_zero(std::abs((x - top) * scale * per_y), last_as_float));
  };
  auto& sums = scratch.histogram;
  sums.assign(last + 1, 0);
  std::mutex mutex;
  at::parallel_for(0, row.groups, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> mine(last + 1);
    float buffer[kGroup];
    int32_t buckets[kGroup];
    int64_t weights[kGroup];
    for (int64_t g = begin; g < end; ++g) {
      if (row.y(scratch.maxima[g]) < least_y) continue;
      const float* x = row.group(g, buffer);
      for (int64_t i = 0; i < kGroup; ++i) buckets[i] = bucket_of(x[i]);
      for (int64_t i = 0; i < kGroup; ++i) weights[i] = weight((x[i] - top) * scale);
      for (int64_t i = 0; i < kGroup; ++i) mine[buckets[i]] += weights[i];
    }
    std::lock_guard lock(mutex);
    for (int32_t i = 0; i <= last; ++i) sums[i] += mine[i];
  });
  const int32_t bucket = find_bucket(sums, target);
  const float from = bucket == last ? -kInf : least_y;
  collect(row, from, scratch, [=](float x) { return bucket_of(x) == bucket; });
  Candidates& c = scratch.candidates;
  for (int64_t i = 0; i < c.n; ++i) c.weight[i] = weight(row.y(c.logit[i]));
  return select(c, target, sums);
}

// Guess for top-k: the k-th largest group maximum (the k-th largest word is no smaller), or well below all of them.
template <typename T>
float guess_top_k(const Row<T>& row, int64_t k, Scratch& scratch) {
  auto& sorted = scratch.sorted = scratch.maxima;
  const auto at = sorted.begin() + std::min(k, row.groups / 2 + 1) - 1;
  std::nth_element(sorted.begin(), at, sorted.end(), std::greater<>());
  return row.y(*at) * (k > row.groups / 2 + 1 ? 4.f : 1.01f);
}

// Guess for top-p: words of mass <= rest / V have at most `rest` together, and those above them reach the target alone.
float guess_top_p(int64_t rest, int64_t v) {
  return log2_of(std::max(static_cast<float>(rest / v), 0.5f)) - kMassBits - 0.01f;
}

int64_t top_p_target(int64_t total, int64_t top_p) {  // ceil(total * top_p / 2^31), below 2^63 throughout
  return (total >> 32) * 2 * top_p + (((total & 0xFFFFFFFF) * top_p + 0x7FFFFFFF) >> 31);
}

template <typename T>
Border find_border(const Row<T>& row, const Settings& settings, int64_t total, Scratch& scratch) {
  const bool all_words = settings.top_k == row.v, all_mass = settings.top_p == int64_t{1} << 31;
  if (all_words && all_mass) return Border{};
  if (all_words) {
    const int64_t target = top_p_target(total, settings.top_p);
    return select_row(row, target, guess_top_p(total - target, row.v), scratch, [](float y) { return mass(y); });
  }
  const float guess = guess_top_k(row, settings.top_k, scratch);
  const Border border = select_row(row, settings.top_k, guess, scratch, [](float) { return int64_t{1}; });
  if (all_mass) return border;
  collect(row, row.y(border.logit), scratch, [&](float x) { return x >= border.logit; });
  Candidates& c = scratch.candidates;
  int64_t sum = 0, n = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    if (!border.allows(c.logit[i], c.index[i])) continue;
    c.move(i, n);
    sum += c.weight[n] = mass(row.y(c.logit[n]));
    ++n;
  }
  c.n = n;
  return select(c, top_p_target(sum, settings.top_p), scratch.histogram);
}

// ---- the draw ----

struct Best {
  float score = std::numeric_limits<float>::lowest();
  int64_t token = std::numeric_limits<int64_t>::max();
  void take(float s, int64_t t) {
    if (s > score || (s == score && t < token)) score = s, token = t;
  }
};

template <typename T>
void draw_group(const Row<T>& row, int64_t g, const Key& key, const Border& border, Best& best) {
  float buffer[kGroup];
  uint32_t words[kGroup];
  const float* x = row.group(g, buffer);
  const float top = row.top, scale = row.scale, least = border.logit;
  philox(key, static_cast<uint32_t>(g * kWidth), words);
  for (int64_t first = 0; first < kGroup; first += kWidth) {
    const float score = best.score;
    int32_t any = 0;
    for (int64_t i = first; i < first + kWidth; ++i) {
      any |= ((x[i] - top) * scale + noise_bound(words[i]) >= score) & (x[i] >= least);
    }
    if (!any) continue;
    for (int64_t i = first; i < first + kWidth; ++i) {
      const float y = row.y(x[i]);
      const int64_t token = g * kGroup + i;
      if (y + noise_bound(words[i]) >= best.score && border.allows(x[i], token)) {
        best.take(y + noise(words[i]), token);
      }
    }
  }
}

template <typename T>
int64_t draw(const Row<T>& row, const std::vector<float>& maxima, const Key& key, const Border& border) {
  const int64_t likely = std::find(maxima.begin(), maxima.end(), row.top) - maxima.begin();
  Best best;
  draw_group(row, likely, key, border, best);  // first, so that the others meet a high score
  std::mutex mutex;
  at::parallel_for(0, row.groups, kGrain, [&](int64_t begin, int64_t end) {
    std::unique_lock lock(mutex);
    Best mine = best;
    lock.unlock();
    for (int64_t g = begin; g < end; ++g) {
      if (maxima[g] < border.logit || row.y(maxima[g]) + kMaxNoise < mine.score || g == likely) continue;
      draw_group(row, g, key, border, mine);
    }
    lock.lock();
    best.take(mine.score, mine.token);
  });
  return best.token;
}

template <typename T>
int64_t first_index(const Row<T>& row, bool (*wanted)(float, float)) {
  int64_t i = 0;
  while (i < row.v && !wanted(row.at(i), row.top)) ++i;
  return i < row.v ? i : 0;
}

template <typename T>
std::pair<int64_t, float> sample_row(Row<T> row, const Settings& settings, const Key& key, Scratch& scratch) {
  auto& maxima = scratch.maxima;
  maxima.resize(row.groups);
  group_maxima(row, maxima.data());
  row.top = -kInf, row.scale = settings.scale;
  for (float m : maxima) row.top = (m > row.top || std::isnan(m)) ? m : row.top;
  for (float m : maxima) row.top = std::isnan(m) ? m : row.top;
  if (!std::isfinite(row.top)) {
    return {first_index<T>(row, [](float x, float) { return std::isnan(x) || x == kInf; }),
            std::numeric_limits<float>::quiet_NaN()};
  }
  const int64_t total = total_mass(row, maxima.data());
  const int64_t token = settings.greedy ? first_index<T>(row, [](float x, float top) { return x == top; })
                                        : draw(row, maxima, key, find_border(row, settings, total, scratch));
  return {token, (row.y(row.at(token)) - log2_of(static_cast<float>(total) * 0x1p-40f)) * kLn2};
}

Settings make_settings(double temperature, double top_p, int64_t top_k, int64_t v) {
  const double scale = 1.4426950408889634 / (temperature == 0 ? 1 : temperature);
  return {static_cast<float>(std::clamp<double>(scale, 0x1p-126, std::numeric_limits<float>::max())),
          top_k == 0 ? v : std::min(top_k, v), static_cast<int64_t>(std::ceil(top_p * 0x1p31)), temperature == 0};
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits_, double temperature, double top_p, int64_t top_k,
                                  const Tensor& seeds_, const Tensor& positions_) {
  const int64_t b = logits_.size(0), v = logits_.size(1);
  // A compiled graph skips the checks in Python; what follows would read or sum past its bounds.
  TORCH_CHECK_VALUE(seeds_.numel() == b && positions_.numel() == b,
                    "sample: expected one seed and one position per row (", b, "), got ", seeds_.numel(), " and ",
                    positions_.numel());
  TORCH_CHECK_VALUE(b == 0 || (v > 0 && v <= kMaxWords), "sample: logits must have 1 to 2^23 columns, got ", v);
  TORCH_CHECK_VALUE(temperature >= 0 && top_p > 0 && top_p <= 1 && top_k >= 0,
                    "sample: need temperature >= 0, 0 < top_p <= 1, top_k >= 0; got ", temperature, ", ", top_p, ", ",
                    top_k);
  const auto logits = logits_.stride(1) == 1 ? logits_ : logits_.contiguous();
  const auto seeds = seeds_.to(at::kLong).contiguous(), positions = positions_.to(at::kLong).contiguous();
  auto tokens = at::empty({b}, logits.options().dtype(at::kLong));
  auto logprobs = at::empty({b}, logits.options().dtype(at::kFloat));
  const auto settings = make_settings(temperature, top_p, top_k, v);
  dispatch(logits, "sample", [&](auto element) {
    using T = decltype(element);
    const auto rows = [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        const Row<T> row{logits.const_data_ptr<T>() + i * logits.stride(0), v, (v + kGroup - 1) / kGroup};
        const Key key(static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[i]),
                      static_cast<uint64_t>(positions.const_data_ptr<int64_t>()[i]));
        const auto [token, logprob] = sample_row(row, settings, key, scratch);
        tokens.mutable_data_ptr<int64_t>()[i] = token;
        logprobs.mutable_data_ptr<float>()[i] = logprob;
      }
    };
    // Whole rows to each thread when there are enough; otherwise the loops within a row share it out.
    b >= at::get_num_threads() ? at::parallel_for(0, b, 1, rows) : rows(0, b);
  });
  return {tokens, logprobs};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("sample", &sample); }

}  // namespace hpsafety
