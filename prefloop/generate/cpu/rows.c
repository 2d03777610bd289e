/* What a decoder layer does to each token's row between its products, in one pass each; loaded by layers.py.

   Rows are divided alike wherever they stand, so that no bit depends on the others or on the number of threads. Sums are
   float32, and results are rounded once. Compiled with BFLOAT16 (0 or 1). */

#include "numbers.h"

/* Fewer numbers than this are one thread's work. */
#define ALONE 8192

/* Sums that are taken side by side. */
#define LANES 64

/* Root mean square norm (Zhang & Sennrich, 2019): out = weight * h / sqrt(mean(h^2) + epsilon), all (N, I). What is in
   `added`, (N, I), unless it is null, is added to h first, which keeps the sum. */
void norm(int threads, long N, long I, float epsilon, number *h, const number *added, const number *weight_I, number *out) {
#pragma omp parallel for num_threads(threads) schedule(static) if (N * I > ALONE)
    for (long n = 0; n < N; n++) {
        number *row = h + n * I;
        if (added)
            for (long i = 0; i < I; i++) row[i] = narrow(wide(row[i]) + wide(added[n * I + i]));
        float sums[LANES] = {0}, sum = 0;
        long i = 0;
        for (; i + LANES <= I; i += LANES)
            for (int lane = 0; lane < LANES; lane++) sums[lane] += wide(row[i + lane]) * wide(row[i + lane]);
        for (; i < I; i++) sum += wide(row[i]) * wide(row[i]);
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
        float factor = 1.0f / sqrtf(sum / I + epsilon);
        for (long j = 0; j < I; j++) out[n * I + j] = narrow(wide(row[j]) * factor * wide(weight_I[j]));
    }
}

/* SiLU(gate) * up, (N, F), of rows that hold gate and up one after the other, (N, 2F). */
void silu_times(int threads, long N, long F, const number *gate_up, number *out) {
#pragma omp parallel for num_threads(threads) schedule(static) if (N * F > ALONE)
    for (long n = 0; n < N; n++) {
        const number *gate = gate_up + 2 * n * F, *up = gate + F;
        for (long f = 0; f < F; f++) {
            float x = wide(gate[f]);
            float capped = x < -87.0f ? -87.0f : x; /* beyond it the result is 0, almost; NaN stays */
            out[n * F + f] = narrow(capped / (1.0f + power_of_two(-capped * LOG2_E)) * wide(up[f]));
        }
    }
}
