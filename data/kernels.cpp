// What data/kernels.py calls for a block of integers, where a pass reads a few tokens: plain loops, of which the
// compiler makes vector instructions (vpdpbusd multiplies and adds up 64 bytes). What comes out for one token does not
// depend on the tokens beside it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// e^x to the last digits of a float (Cephes); a call of std::exp would not be vectorised.
static inline float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  float n = std::nearbyint(x * 1.44269504f);
  float f = x - n * 0.693359375f + n * 2.12194440e-4f;              // x = n log(2) + f
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;                                         // e^f, which 2^n is multiplied with in its bits
  int32_t bits;
  std::memcpy(&bits, &p, 4);
  bits += (int32_t)n << 23;
  std::memcpy(&p, &bits, 4);
  return p;
}

// What model.norm multiplies x (n,) with.
static float norm_factor(const float* x, int n, float eps) {
  float sum = 0;
  #pragma omp simd reduction(+:sum)
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / n + eps);
}

// model.hadamard of z (K,), in place: sums and differences of neighbours, of pairs of them, and so on.
static void hadamard(float* z, int K, int n) {
  for (int half = 1; half < n; half *= 2)
    for (int first = 0; first < K; first += 2 * half)
      for (int i = first; i < first + half; i++) {
        float a = z[i], b = z[i + half];
        z[i] = a + b;
        z[i + half] = a - b;
      }
}

// What a matrix reads: x itself, its norm, relu(x)^2, or silu(gate) * hidden, where x is gate and hidden. Hidden units are
// turned by Hadamard matrices of so many, if turned is not 0.
enum Input { AS_IT_IS, NORM, RELU2, SWIGLU };

static void prepare(const float* x, float* z, int K, int input, int turned, float eps) {
  float factor = input == NORM ? norm_factor(x, K, eps) : 1;
  if (input == RELU2)
    for (int k = 0; k < K; k++) z[k] = x[k] > 0 ? x[k] * x[k] : 0;
  else if (input == SWIGLU)
    #pragma omp simd
    for (int k = 0; k < K; k++) z[k] = x[k] / (1 + exp_of(-x[k])) * x[K + k];
  else
    for (int k = 0; k < K; k++) z[k] = x[k] * factor;
  hadamard(z, K, turned);
}

// data/rounding.round_rows of what a matrix reads of x (M, K or 2 K): xq (M, K), the integers plus 128, and xs (M,).
extern "C" void round_rows(const float* x, uint8_t* xq, float* xs, int M, int K, int input, int turned,
                           float eps) {
  #pragma omp parallel if (M > 16)
  {
    std::vector<float> z(K);
    #pragma omp for schedule(static)
    for (int m = 0; m < M; m++) {
      prepare(x + (size_t)m * (input == SWIGLU ? 2 * K : K), z.data(), K, input, turned, eps);
      float peak = 1e-12f;
      #pragma omp simd reduction(max:peak)
      for (int k = 0; k < K; k++) peak = std::fabs(z[k]) > peak ? std::fabs(z[k]) : peak;
      float up = 1 / peak * 127;                                    // PyTorch's 127 / peak, to the bit
      uint8_t* row = xq + (size_t)m * K;
      for (int k = 0; k < K; k++) row[k] = (uint8_t)((int32_t)std::nearbyint(z[k] * up) + 128);
      xs[m] = peak / 127;
    }
  }
}

// A row of 4 bits, as data/rounding.into_bytes has it, and its groups' steps -> the int8 that it stands for, v (K,).
// The sixteen values that a step makes stand in a table, in which one instruction looks up 32 of them.
static void unpack_row(const uint8_t* w, const int8_t* step, int8_t* v, int K, int group) {
  static const struct Table {
    int8_t values[37][16];                                          // of the steps -18, ..., 18
    Table() { for (int s = 0; s < 37; s++) for (int q = 0; q < 16; q++) values[s][q] = (int8_t)((q - 8) * (s - 18)); }
  } table;
  int half = K / 2, shift = group == 32 ? 5 : group == 64 ? 6 : 7;  // a division would take longer than all the rest
  for (int k = 0; k < half; k += 32) {
    const int8_t *low = table.values[step[k >> shift] + 18], *high = table.values[step[(half + k) >> shift] + 18];
#ifdef __AVX2__
    __m256i bytes = _mm256_loadu_si256((const __m256i*)(w + k)), four_bits = _mm256_set1_epi8(15);
    __m256i left = _mm256_and_si256(bytes, four_bits);
    __m256i right = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four_bits);
    __m256i lows = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)low));
    __m256i highs = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)high));
    _mm256_storeu_si256((__m256i*)(v + k), _mm256_shuffle_epi8(lows, left));
    _mm256_storeu_si256((__m256i*)(v + half + k), _mm256_shuffle_epi8(highs, right));
#else
    for (int i = k; i < k + 32; i++) {
      v[i] = low[w[i] & 15];
      v[half + i] = high[w[i] >> 4];
    }
#endif
  }
}

// All rows of a matrix of 4 bits -> v (N, K).
extern "C" void unpack(const uint8_t* w, const int8_t* step, int8_t* v, int N, int K, int group) {
  #pragma omp parallel for schedule(static)
  for (int n = 0; n < N; n++)
    unpack_row(w + (size_t)n * (K / 2), step + (size_t)n * (K / group), v + (size_t)n * K, K, group);
}

// IntLinear: y (M, N) of what it reads of x, and rest (M, N) is added, if there is one. w is int8 (N, K), or 4 bits if
// there is a group; sums (N,) those of each row of integers, of which the 128 in xq makes too much. Eight rows of the
// matrix stay in the nearest cache until all rows of x have met them.
extern "C" void int_linear(const float* x, const void* w, const int8_t* step, const int32_t* sums, const float* scale,
                           const float* rest, float* y, int M, int N, int K, int group, int input, int turned,
                           float eps) {
  std::vector<uint8_t> xq((size_t)M * K);
  std::vector<float> xs(M);
  round_rows(x, xq.data(), xs.data(), M, K, input, turned, eps);
  int bytes = group ? K / 2 : K;                                    // of a row
  #pragma omp parallel
  {
    std::vector<int8_t> unpacked(group ? 8 * K : 0);
    #pragma omp for schedule(static)
    for (int first = 0; first < N; first += 8) {
      int end = first + 8 < N ? first + 8 : N;
      // the next eight rows are on their way from memory meanwhile
      const char* next = (const char*)w + (size_t)end * bytes;
      for (size_t i = 0; end + 8 <= N && i < 8 * (size_t)bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
      const int8_t* v = (const int8_t*)w + (size_t)first * K;
      if (group) {
        for (int n = first; n < end; n++)
          unpack_row((const uint8_t*)w + (size_t)n * (K / 2), step + (size_t)n * (K / group),
                     unpacked.data() + (n - first) * K, K, group);
        v = unpacked.data();
      }
      for (int n = first; n < end; n++, v += K)
        for (int m = 0; m < M; m++) {
          const uint8_t* u = xq.data() + (size_t)m * K;
          int32_t sum = -128 * sums[n];
          for (int k = 0; k < K; k++) sum += (int32_t)u[k] * (int32_t)v[k];
          size_t at = (size_t)m * N + n;
          y[at] = (float)sum * scale[n] * xs[m];
          if (rest) y[at] += rest[at];
        }
    }
  }
}

// model.rotate of one head x (D,), in place, and model.norm behind it if it is normed.
static void turn(float* x, const float* cos, const float* sin, int D, int normed, float eps) {
  for (int i = 0, j = D / 2; j < D; i++, j++) {
    float a = x[i], b = x[j];
    x[i] = a * cos[i] + b * sin[i];
    x[j] = b * cos[j] + a * sin[j];
  }
  if (!normed) return;
  float factor = norm_factor(x, D, eps);
  for (int i = 0; i < D; i++) x[i] *= factor;
}

// One query q (D,) over the keys and values of n tokens, k and v (n, D) -> y (D,). scores: room for n numbers.
static void attend_one(const float* q, const float* k, const float* v, float* scores, float* y, int n, int D) {
  float scale = 1 / std::sqrt((float)D), peak = -INFINITY, total = 0;
  for (int s = 0; s < n; s++) {
    float sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int i = 0; i < D; i++) sum += q[i] * k[(size_t)s * D + i];
    scores[s] = sum * scale;
    peak = scores[s] > peak ? scores[s] : peak;
  }
  #pragma omp simd reduction(+:total)
  for (int s = 0; s < n; s++) {
    scores[s] = exp_of(scores[s] - peak);
    total += scores[s];
  }
  std::memset(y, 0, D * sizeof(float));
  for (int s = 0; s < n; s++) {
    float share = scores[s] / total;
    for (int i = 0; i < D; i++) y[i] += share * v[(size_t)s * D + i];
  }
}

// qkv (B, T, H + 2 KV, D) -> y (B, T, H, D). Turns q and k, by cos and sin (T, D), or (B, T, D) where rows are ragged;
// writes k and v into the cache, keys and values (B, KV, size, D), behind the starts[b] tokens of row b; and lets every
// query attend to the tokens up to its own, which is the rule of model.sees.
extern "C" void attend(float* qkv, const float* cos, const float* sin, float* keys, float* values,
                       const int64_t* starts, float* y, int B, int T, int H, int KV, int D, int size, int ragged,
                       int normed, float eps) {
  int heads = H + 2 * KV;
  #pragma omp parallel
  {
    std::vector<float> scores(size);
    #pragma omp for schedule(static)
    for (int i = 0; i < B * T * heads; i++) {
      int b = i / heads / T, t = i / heads % T, h = i % heads;
      size_t place = starts[b] + t, row = (ragged ? b * T : 0) + t;
      float* x = qkv + (size_t)i * D;
      if (h < H + KV) turn(x, cos + row * D, sin + row * D, D, normed, eps);
      if (h >= H) {
        float* store = h < H + KV ? keys : values;
        std::memcpy(store + (((size_t)b * KV + (h - H) % KV) * size + place) * D, x, D * sizeof(float));
      }
    }
    #pragma omp for schedule(static)
    for (int i = 0; i < B * T * H; i++) {
      int b = i / H / T, t = i / H % T, h = i % H;
      size_t at = ((size_t)b * KV + h / (H / KV)) * size * D;
      const float* q = qkv + ((size_t)(b * T + t) * heads + h) * D;
      attend_one(q, keys + at, values + at, scores.data(), y + (size_t)i * D, (int)starts[b] + t + 1, D);
    }
  }
}
