/* Tokens of a decode step side by side, so that one vector holds one feature of all of them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Features that are turned at a time: what is written stays in the first cache. */
#define TURN 64

/* x (tokens, n) as (n, width), zeros behind the tokens; NULL without memory. */
static inline float *side_by_side(const float *x, int64_t tokens, int64_t n, int64_t width) {
    float *turned = aligned_alloc(64, (size_t)(n * width * (int64_t)sizeof(float) + 63) / 64 * 64);
    if (turned == NULL) return NULL;
    if (tokens < width) memset(turned, 0, (size_t)(n * width) * sizeof(float));
    for (int64_t low = 0; low < n; low += TURN) {
        const int64_t high = low + TURN < n ? low + TURN : n;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = low; j < high; j++) turned[j * width + t] = x[t * n + j];
    }
    return turned;
}
