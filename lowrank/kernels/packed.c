/* Many small dense systems from packed upper triangles, in fp64. */

#include <float.h>
#include <math.h>
#include <string.h>

#include "threads.h"

/* a = U^T U in place of the upper triangle, row by row; 0 when a is not positive definite. */
static int factor_f64(double *a, int64_t r) {
    for (int64_t i = 0; i < r; i++) {
        double *row = a + i * r;
        int64_t p = 0;
        for (; p + 4 <= i; p += 4) {
            const double *u0 = a + p * r, *u1 = u0 + r, *u2 = u1 + r, *u3 = u2 + r;
            const double f0 = u0[i], f1 = u1[i], f2 = u2[i], f3 = u3[i];
            for (int64_t c = i; c < r; c++) row[c] -= (f0 * u0[c] + f1 * u1[c]) + (f2 * u2[c] + f3 * u3[c]);
        }
        for (; p < i; p++) {
            const double f = a[p * r + i];
            for (int64_t c = i; c < r; c++) row[c] -= f * a[p * r + c];
        }
        if (!(row[i] > 0)) return 0;
        const double inverse = 1.0 / sqrt(row[i]);
        for (int64_t c = i; c < r; c++) row[c] *= inverse;
    }
    return 1;
}

static void back_f64(const double *u, int64_t r, double *x) {
    for (int64_t p = 0; p < r; p++) {
        x[p] /= u[p * r + p];
        for (int64_t c = p + 1; c < r; c++) x[c] -= x[p] * u[p * r + c];
    }
    for (int64_t p = r - 1; p >= 0; p--) {
        double sum = x[p];
        for (int64_t c = p + 1; c < r; c++) sum -= u[p * r + c] * x[c];
        x[p] = sum / u[p * r + p];
    }
}

typedef struct {
    int64_t r;
    const void *grams, *rhs, *start;
    const double *shifts;
    void *found;
} Packed;

/* x = start + (G + (shift + damping) I)^-1 (b - (G + shift I) start); 0 where G = 0. Shift and damping together are
   no less than what rounding may have taken from G. */
#define SOLVE_PACKED(NAME, REAL, EPSILON)                                                                             \
    static void NAME##_rows(Job *job) {                                                                               \
        const Packed *q = job->data;                                                                                  \
        const int64_t r = q->r;                                                                                       \
        double *full = malloc((2 * r * r + r) * sizeof(double)), *factor = full + r * r, *x = factor + r * r;         \
        for (int64_t i, end; full && take(job, &i, &end);)                                                            \
            for (; i < end; i++) {                                                                                    \
                const REAL *packed = (const REAL *)q->grams + i * (r * (r + 1) / 2);                                  \
                const REAL *rhs = (const REAL *)q->rhs + i * r, *start = (const REAL *)q->start + i * r;              \
                REAL *found = (REAL *)q->found + i * r;                                                               \
                double trace = 0;                                                                                     \
                for (int64_t p = 0; p < r; p++)                                                                       \
                    for (int64_t c = p; c < r; c++) full[p * r + c] = full[c * r + p] = *packed++;                    \
                for (int64_t p = 0; p < r; p++) trace += full[p * r + p];                                             \
                for (int64_t p = 0; p < r; p++) found[p] = trace > 0 ? start[p] : 0;                                  \
                if (!(trace > 0)) continue;                                                                           \
                const double rounding = 4 * (double)EPSILON * trace, shift = q->shifts[i];                            \
                double damping = rounding > shift ? rounding - shift : 0;                                             \
                int attempt = 0;                                                                                      \
                do {                                                                                                  \
                    memcpy(factor, full, r * r * sizeof(double));                                                     \
                    for (int64_t p = 0; p < r; p++) factor[p * r + p] += shift + damping;                             \
                    damping = 10 * (damping > rounding ? damping : rounding);                                         \
                } while (!factor_f64(factor, r) && ++attempt < ATTEMPTS);                                             \
                if (attempt == ATTEMPTS) continue;                                                                    \
                for (int64_t p = 0; p < r; p++) {                                                                     \
                    double sum = rhs[p] - shift * start[p];                                                           \
                    for (int64_t c = 0; c < r; c++) sum -= full[p * r + c] * start[c];                                \
                    x[p] = sum;                                                                                       \
                }                                                                                                     \
                back_f64(factor, r, x);                                                                               \
                for (int64_t p = 0; p < r; p++) found[p] = (REAL)(start[p] + x[p]);                                   \
            }                                                                                                         \
        free(full);                                                                                                   \
    }                                                                                                                 \
    int NAME(int64_t rows, int64_t r, const REAL *grams, const REAL *rhs, const double *shifts, const REAL *start,    \
             REAL *found, int threads) {                                                                              \
        const Packed packed = {r, grams, rhs, start, shifts, found};                                                  \
        Job job = {rows, 0, NAME##_rows, &packed};                                                                    \
        return run(&job, threads);                                                                                    \
    }

SOLVE_PACKED(solve_packed_f32, float, FLT_EPSILON)
SOLVE_PACKED(solve_packed_f64, double, DBL_EPSILON)
