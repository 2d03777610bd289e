/* Attention of a step's tokens over their conversations' slots (kv_cache.py), on CPUs; loaded by
   attention.py.

   Keys and values are read once, where they lie, for all query heads that share them; sums are float32 whatever the
   numbers are. Every token's sums are divided at the same positions of its conversation, so that no bit depends on
   the others in the step or on the number of threads.

   Compiled with D (head dimension), G (query heads for each key/value head) and BFLOAT16 (0 or 1). */

#include <stdlib.h>

#include "numbers.h"

/* The head dimension, filled up to whole vectors with zeros. */
#define WIDTH ((D + 15) / 16 * 16)

/* Positions ahead of which keys and values are fetched: a processor does not do so by itself across pages. */
#define AHEAD 32

/* Query heads whose sums over values fit registers together. */
#define HEADS (D >= 384 ? 1 : 384 / D < G ? 384 / D : G)

/* Ask for `rows` rows of D numbers ahead of their use; what lies beyond is harmless. */
static inline void fetch(const number *rows_D, int rows) {
    for (unsigned long at = 0; at < rows * D * sizeof(number); at += 64) __builtin_prefetch((const char *)rows_D + at);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(64)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* Two vectors whose lanes are to be summed become one: lanes `apart` from each other are added, a's where that bit of
   the lane's number is 0, b's where it is 1. */
#define EVERY(PICK, h) \
    PICK(0, h), PICK(1, h), PICK(2, h), PICK(3, h), PICK(4, h), PICK(5, h), PICK(6, h), PICK(7, h), \
    PICK(8, h), PICK(9, h), PICK(10, h), PICK(11, h), PICK(12, h), PICK(13, h), PICK(14, h), PICK(15, h)
#define NEAR(lane, h) ((lane) & (h) ? 16 + ((lane) ^ (h)) : (lane))
#define FAR(lane, h) ((lane) & (h) ? 16 + (lane) : (lane) ^ (h))
#define FOLD(a, b, apart) (SHUFFLE(a, b, EVERY(NEAR, apart)) + SHUFFLE(a, b, EVERY(FAR, apart)))

/* Scores of 16 keys: lane t is the product of `query` and the key at position t of `keys`. */
static inline floats score(const float query[WIDTH], const float keys[16][WIDTH]) {
    floats sums[16];
    for (int t = 0; t < 16; t++) {
        floats sum = {0};
        for (int d = 0; d < WIDTH; d += 16) {
            floats x, y;
            memcpy(&x, query + d, sizeof x);
            memcpy(&y, keys[t] + d, sizeof y);
            sum += x * y;
        }
        sums[t] = sum;
    }
    for (int t = 0; t < 8; t++) sums[t] = FOLD(sums[t], sums[t + 8], 8);
    for (int t = 0; t < 4; t++) sums[t] = FOLD(sums[t], sums[t + 4], 4);
    for (int t = 0; t < 2; t++) sums[t] = FOLD(sums[t], sums[t + 2], 2);
    return FOLD(sums[0], sums[1], 1);
}

/* A head turned to its position: `cosines` and `sines` have D numbers, as transformers' rotary embeddings do. */
static inline void rotate(const number *head, const number *cosines, const number *sines, float *out) {
    for (int d = 0; d < D / 2; d++) {
        float low = wide(head[d]), high = wide(head[d + D / 2]);
        out[d] = low * wide(cosines[d]) - high * wide(sines[d]);
        out[d + D / 2] = high * wide(cosines[d + D / 2]) + low * wide(sines[d + D / 2]);
    }
}

/* One token's attention to positions begin <= t < end of a slot, for the G query heads of a key/value head. Scores are
   in base 2. `weights` is room for (G, C), `out` (G, D). */
static void attend_head(const float query[G][WIDTH], const number *keys_CD, const number *values_CD, float *weights_GC, long C,
                        long begin, long end, number *out) {
    for (long first = begin / 16 * 16; first < end; first += 16) {
        fetch(keys_CD + (first + AHEAD) * D, 16);
#if BFLOAT16 || D % 16
        float keys[16][WIDTH] = {{0}};
        for (int t = 0; t < 16; t++)
            for (int d = 0; d < D; d++) keys[t][d] = wide(keys_CD[(first + t) * D + d]);
#else
        const float(*keys)[WIDTH] = (const float(*)[WIDTH])(keys_CD + first * D);
#endif
        for (int g = 0; g < G; g++) {
            floats scores = score(query[g], keys);
            memcpy(weights_GC + g * C + first, &scores, sizeof scores);
        }
    }
    fetch(values_CD + begin * D, AHEAD);
    float total[G];
    for (int g = 0; g < G; g++) {
        float *weights = weights_GC + g * C, largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (long t = begin; t < end; t++) largest = weights[t] > largest ? weights[t] : largest;
#pragma omp simd reduction(+ : sum)
        for (long t = begin; t < end; t++) sum += weights[t] = power_of_two(weights[t] - largest);
        total[g] = sum;
    }
    for (int head = 0; head < G; head += HEADS) {
        int heads = G - head < HEADS ? G - head : HEADS;
        float sums[HEADS][D] = {{0}};
        if (heads == HEADS) {
            for (long t = begin; t < end; t++) {
                fetch(values_CD + (t + AHEAD) * D, 1);
                for (int g = 0; g < HEADS; g++)
                    for (int d = 0; d < D; d++) sums[g][d] += weights_GC[(head + g) * C + t] * wide(values_CD[t * D + d]);
            }
        } else {
            for (long t = begin; t < end; t++)
                for (int g = 0; g < heads; g++)
                    for (int d = 0; d < D; d++) sums[g][d] += weights_GC[(head + g) * C + t] * wide(values_CD[t * D + d]);
        }
        for (int g = 0; g < heads; g++)
            for (int d = 0; d < D; d++) out[(head + g) * D + d] = narrow(sums[g][d] / total[head + g]);
    }
}

/* Write the keys and values of a step's tokens to their slots, then attend: each token to the `window` last positions of
   its slot up to its own. N tokens, K key/value heads, C positions of a slot. Query (N, K, G, D), new keys and values
   (N, K, D), whose rows lie `row` numbers apart; slots' keys and values (S, K, C, D); out (N, K, G, D). Queries and new
   keys are turned by cosines and sines (N, D), unless these are null. Scores are multiplied by `scale`. Returns 0, or 1
   where there is no memory. */
int attend(int threads, long N, long K, long C, long window, float scale, long query_row, long key_row, long value_row,
           const int64_t *slots_N, const int64_t *positions_N, const number *query, const number *new_keys,
           const number *new_values, number *keys_SKCD, number *values_SKCD, const number *cosines_ND,
           const number *sines_ND, number *out) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long task = 0; task < N * K; task++) {
            long token = task / K, head = task % K, place = ((slots_N[token] * K + head) * C + positions_N[token]) * D;
            const number *new_key = new_keys + token * key_row + head * D;
            memcpy(values_SKCD + place, new_values + token * value_row + head * D, D * sizeof(number));
            if (cosines_ND) {
                float turned[D];
                rotate(new_key, cosines_ND + token * D, sines_ND + token * D, turned);
                for (int d = 0; d < D; d++) keys_SKCD[place + d] = narrow(turned[d]);
            } else
                memcpy(keys_SKCD + place, new_key, D * sizeof(number));
        }
        /* Aligned, as loops may be divided where alignment begins; C is a multiple of 64. */
        float *weights_GC = aligned_alloc(64, sizeof(float) * G * C);
#pragma omp for schedule(dynamic, 4)
        for (long task = 0; task < N * K; task++) {
            if (!weights_GC) {
                failed = 1;
                continue;
            }
            long token = task / K, end = positions_N[token] + 1, slot = (slots_N[token] * K + task % K) * C * D;
            float scaled[G][WIDTH] = {{0}};
            for (int g = 0; g < G; g++) {
                const number *head = query + token * query_row + (task % K * G + g) * D;
                if (cosines_ND)
                    rotate(head, cosines_ND + token * D, sines_ND + token * D, scaled[g]);
                else
                    for (int d = 0; d < D; d++) scaled[g][d] = wide(head[d]);
                for (int d = 0; d < D; d++) scaled[g][d] *= scale * LOG2_E;
            }
            attend_head(scaled, keys_SKCD + slot, values_SKCD + slot, weights_GC, C, end > window ? end - window : 0, end,
                        out + task * G * D);
        }
        free(weights_GC);
    }
    return failed;
}
