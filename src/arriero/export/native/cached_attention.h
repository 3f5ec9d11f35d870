// Attention of one token of each of some sequences to the keys and values that a cache holds of it.
#ifndef ARRIERO_CACHED_ATTENTION_H
#define ARRIERO_CACHED_ATTENTION_H

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

namespace arriero {

using Vector = at::vec::Vectorized<float>;
constexpr int kTogether = 4;  // vectors of a head that are summed at once

inline float sum_of(const Vector& x) {
  return at::vec::vec_reduce_all<float>([](Vector& a, Vector& b) { return a + b; }, x);
}

// A head's keys and values, (tokens, size) each, one after the other.
struct Head {
  const float* keys;
  const float* values;
  int64_t size;
  int64_t first;  // of the tokens that are attended to
  int64_t end;
};

// Queries (heads, size) that share a head's keys -> (heads, size); `scores` has room for heads * (end - first) numbers.
template <int heads>
inline void attend(const float* query, const Head& head, float scale, float* scores, float* result) {
  constexpr int lanes = Vector::size();
  const int64_t count = head.end - head.first, size = head.size;
  for (int64_t t = 0; t < count; ++t) {
    const float* key = head.keys + (head.first + t) * size;
    Vector sums[heads];
    for (int h = 0; h < heads; ++h) sums[h] = Vector(0.0f);
    int64_t d = 0;
    for (; d + lanes <= size; d += lanes) {
      const Vector own = Vector::loadu(key + d);
      for (int h = 0; h < heads; ++h) sums[h] = at::vec::fmadd(Vector::loadu(query + h * size + d), own, sums[h]);
    }
    if (d < size) {
      const Vector own = Vector::loadu(key + d, size - d);
      for (int h = 0; h < heads; ++h)
        sums[h] = at::vec::fmadd(Vector::loadu(query + h * size + d, size - d), own, sums[h]);
    }
    for (int h = 0; h < heads; ++h) scores[h * count + t] = sum_of(sums[h]) * scale;
  }
  float whole[heads];
  for (int h = 0; h < heads; ++h) {
    float* own = scores + h * count;
    float largest = own[0];
    for (int64_t t = 1; t < count; ++t) largest = own[t] > largest ? own[t] : largest;
    Vector sums(0.0f);
    float rest = 0;
    int64_t t = 0;
    for (; t + lanes <= count; t += lanes) {
      const Vector value = (Vector::loadu(own + t) - Vector(largest)).exp();
      value.store(own + t);
      sums = sums + value;
    }
    for (; t < count; ++t) rest += own[t] = std::exp(own[t] - largest);
    whole[h] = 1.0f / (sum_of(sums) + rest);
  }
  for (int64_t begin = 0; begin < size; begin += kTogether * lanes) {
    const int64_t left = size - begin;
    const int vectors = static_cast<int>(std::min<int64_t>(kTogether, (left + lanes - 1) / lanes));
    const int last = static_cast<int>(left - (vectors - 1) * lanes < lanes ? left - (vectors - 1) * lanes : lanes);
    Vector sums[heads][kTogether];
    for (int h = 0; h < heads; ++h)
      for (int v = 0; v < kTogether; ++v) sums[h][v] = Vector(0.0f);
    const auto add = [&](int64_t t, int v, const Vector& value) {
      for (int h = 0; h < heads; ++h) sums[h][v] = at::vec::fmadd(Vector(scores[h * count + t]), value, sums[h][v]);
    };
    for (int64_t t = 0; t < count; ++t) {
      const float* value = head.values + (head.first + t) * size + begin;
      if (vectors == kTogether && last == lanes) {
        for (int v = 0; v < kTogether; ++v) add(t, v, Vector::loadu(value + v * lanes));
      } else {
        for (int v = 0; v < vectors; ++v) add(t, v, Vector::loadu(value + v * lanes, v + 1 < vectors ? lanes : last));
      }
    }
    for (int h = 0; h < heads; ++h)
      for (int v = 0; v < vectors; ++v)
        (sums[h][v] * Vector(whole[h])).store(result + h * size + begin + v * lanes, v + 1 < vectors ? lanes : last);
  }
}

// Queries (rows, heads, size), a cache (rows, 2 kv, room, size) -> (rows, heads, size).
inline void cached_attention(
    const float* query, const float* cache, const int64_t* starts, float* result, int64_t rows, int64_t heads,
    int64_t kv, int64_t room, int64_t size, int64_t window, float scale) {
  const int64_t groups = heads / kv, most = 4 * (*std::max_element(starts, starts + rows) + 1);
#ifdef _OPENMP
  const std::unique_ptr<float[]> scratch(new float[most * omp_get_max_threads()]);
#else
  const std::unique_ptr<float[]> scratch(new float[most]);
#endif
#pragma omp parallel for
  for (int64_t pair = 0; pair < rows * kv; ++pair) {
    const int64_t row = pair / kv, own = pair % kv, end = starts[row] + 1;
    const float* keys = cache + (row * 2 * kv + own) * room * size;
    const Head head{keys, keys + kv * room * size, size, window > 0 ? std::max<int64_t>(0, end - window) : 0, end};
#ifdef _OPENMP
    float* const scores = scratch.get() + most * omp_get_thread_num();
#else
    float* const scores = scratch.get();
#endif
    const float* first = query + (row * heads + own * groups) * size;
    float* target = result + (row * heads + own * groups) * size;
    int64_t h = 0;
    for (; h + 4 <= groups; h += 4) attend<4>(first + h * size, head, scale, scores, target + h * size);
    switch (groups - h) {
      case 3: attend<3>(first + h * size, head, scale, scores, target + h * size); break;
      case 2: attend<2>(first + h * size, head, scale, scores, target + h * size); break;
      case 1: attend<1>(first + h * size, head, scale, scores, target + h * size); break;
      default: break;
    }
  }
}

}  // namespace arriero

#endif
