/* The numbers of a model's activations, and vectors of 16 floats. BFLOAT16 is 0 or 1. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if BFLOAT16
typedef uint16_t number;
static inline float wide(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
static inline number narrow(float x) {
    if (x != x) return 0x7fc0; /* rounding could make a NaN infinite */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (number)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to the nearest, ties to even */
}
#else
typedef float number;
static inline float wide(number x) { return x; }
static inline number narrow(float x) { return x; }
#endif

typedef float floats __attribute__((vector_size(64)));

/* 2^x for x <= 127 within 2 units in the last place; what float32 cannot hold is 0, almost. */
static inline float power_of_two(float x) {
    x = x < -126.0f ? -126.0f : x;
    float whole = (x + 12582912.0f) - 12582912.0f, rest = x - whole; /* 1.5 * 2^23 rounds to integers */
    float power = 1.5403530e-4f; /* Taylor's series; |rest| is at most 1/2 */
    power = power * rest + 1.3333558e-3f;
    power = power * rest + 9.6181291e-3f;
    power = power * rest + 5.5504109e-2f;
    power = power * rest + 2.4022651e-1f;
    power = power * rest + 6.9314718e-1f;
    power = power * rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}

#define LOG2_E 1.44269504f
