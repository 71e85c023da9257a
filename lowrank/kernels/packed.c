/* Many small dense systems from packed upper triangles, in fp64. */

#include <float.h>
#include <math.h>
#include <string.h>

#include "threads.h"

/* LANES systems at a time, entry by entry side by side: number k of system l is entry[k][l]. Every lane takes the same
   steps, so that no system depends on its neighbours. */
#define LANES GRAIN
typedef double Entry __attribute__((vector_size(LANES * sizeof(double))));

/* Row p of a packed upper triangle begins here if its columns are counted from 0. */
static inline int64_t row_of(int64_t p, int64_t r) { return p * r - p * (p + 1) / 2; }

/* u = U^T U in place, row by row. `bad` collects lanes that are not positive definite; they go on with a pivot of 1. */
static void factor(Entry *u, int64_t r, int *bad) {
    for (int64_t i = 0; i < r; i++) {
        Entry *row = u + row_of(i, r), inverse;
        int64_t p = 0;
        for (; p + 4 <= i; p += 4) {
            const Entry *u0 = u + row_of(p, r), *u1 = u + row_of(p + 1, r);
            const Entry *u2 = u + row_of(p + 2, r), *u3 = u + row_of(p + 3, r);
            const Entry f0 = u0[i], f1 = u1[i], f2 = u2[i], f3 = u3[i];
            for (int64_t c = i; c < r; c++) row[c] -= (f0 * u0[c] + f1 * u1[c]) + (f2 * u2[c] + f3 * u3[c]);
        }
        for (; p < i; p++) {
            const Entry *up = u + row_of(p, r), f = up[i];
            for (int64_t c = i; c < r; c++) row[c] -= f * up[c];
        }
        for (int l = 0; l < LANES; l++) {
            const int positive = row[i][l] > 0;
            bad[l] |= !positive;
            inverse[l] = positive ? 1.0 / sqrt(row[i][l]) : 1.0;
        }
        for (int64_t c = i; c < r; c++) row[c] *= inverse;
        for (int l = 0; l < LANES; l++)
            if (bad[l]) row[i][l] = 1;
    }
}

/* x = (U^T U)^-1 x. */
static void back(const Entry *u, int64_t r, Entry *x) {
    for (int64_t p = 0; p < r; p++) {
        const Entry *up = u + row_of(p, r), f = x[p] / up[p];
        x[p] = f;
        for (int64_t c = p + 1; c < r; c++) x[c] -= f * up[c];
    }
    for (int64_t p = r - 1; p >= 0; p--) {
        const Entry *up = u + row_of(p, r);
        Entry sum = x[p];
        for (int64_t c = p + 1; c < r; c++) sum -= up[c] * x[c];
        x[p] = sum / up[p];
    }
}

/* x -= (G + shift I) s. */
static void subtract_product(const Entry *g, int64_t r, Entry shift, const Entry *s, Entry *x) {
    for (int64_t p = 0; p < r; p++) {
        const Entry *gp = g + row_of(p, r), f = s[p];
        Entry sum = (gp[p] + shift) * f;
        for (int64_t c = p + 1; c < r; c++) {
            sum += gp[c] * s[c];
            x[c] -= gp[c] * f;
        }
        x[p] -= sum;
    }
}

/* s += (G + (shift + damping) I)^-1 x in the lanes where trace > 0. Damping is what shift lacks of `rounding`, raised
   tenfold for a lane until its factorisation exists; where none does, s stays. u and y are work space. */
static void step(const Entry *g, int64_t r, Entry trace, Entry shift, Entry rounding, const Entry *x, Entry *s, Entry *u,
                 Entry *y) {
    Entry damping;
    int left[LANES], pending = 0;
    for (int l = 0; l < LANES; l++) {
        damping[l] = rounding[l] > shift[l] ? rounding[l] - shift[l] : 0;
        left[l] = trace[l] > 0;
        pending |= left[l];
    }
    for (int attempt = 0; pending && attempt < ATTEMPTS; attempt++) {
        int bad[LANES] = {0};
        memcpy(u, g, r * (r + 1) / 2 * sizeof(Entry));
        for (int64_t p = 0; p < r; p++) u[row_of(p, r) + p] += shift + damping;
        factor(u, r, bad);
        memcpy(y, x, r * sizeof(Entry));
        back(u, r, y);
        pending = 0;
        for (int l = 0; l < LANES; l++) {
            if (!left[l]) continue;
            if (bad[l]) {
                damping[l] = 10 * (damping[l] > rounding[l] ? damping[l] : rounding[l]);
                pending = 1;
                continue;
            }
            left[l] = 0;
            for (int64_t p = 0; p < r; p++) s[p][l] += y[p][l];
        }
    }
}

typedef struct {
    int64_t r;
    const void *grams, *rhs, *start;
    const double *shifts;
    void *found;
} Packed;

/* found = start + (G + (shift + damping) I)^-1 (b - (G + shift I) start); 0 where G = 0, and start where no damping
   helps. Shift and damping together are no less than what rounding may have taken from G. */
#define SOLVE_PACKED(NAME, REAL, EPSILON)                                                                             \
    static void NAME##_rows(Job *job) {                                                                               \
        const Packed *q = job->data;                                                                                  \
        const int64_t r = q->r, size = r * (r + 1) / 2;                                                               \
        Entry *g = aligned_alloc(sizeof(Entry), (2 * size + 3 * r) * sizeof(Entry));                                  \
        Entry *u = g + size, *s = u + size, *x = s + r, *y = x + r;                                                   \
        for (int64_t low, end; g && take(job, &low, &end);) {                                                         \
            Entry trace = {0}, shift = {0};                                                                           \
            if (end - low < LANES) memset(g, 0, size * sizeof(Entry)), memset(s, 0, 2 * r * sizeof(Entry));           \
            for (int64_t i = low; i < end; i++) {                                                                     \
                const REAL *packed = (const REAL *)q->grams + i * size;                                               \
                const REAL *rhs = (const REAL *)q->rhs + i * r, *start = (const REAL *)q->start + i * r;              \
                for (int64_t k = 0; k < size; k++) g[k][i - low] = packed[k];                                         \
                for (int64_t p = 0; p < r; p++) s[p][i - low] = start[p], x[p][i - low] = rhs[p];                     \
                shift[i - low] = q->shifts[i];                                                                        \
            }                                                                                                         \
            for (int64_t p = 0; p < r; p++) trace += g[row_of(p, r) + p];                                             \
            subtract_product(g, r, shift, s, x);                                                                      \
            step(g, r, trace, shift, 4 * (double)EPSILON * trace, x, s, u, y);                                        \
            for (int64_t i = low; i < end; i++)                                                                       \
                for (int64_t p = 0; p < r; p++)                                                                       \
                    ((REAL *)q->found)[i * r + p] = trace[i - low] > 0 ? (REAL)s[p][i - low] : 0;                     \
        }                                                                                                             \
        free(g);                                                                                                      \
    }                                                                                                                 \
    int NAME(int64_t rows, int64_t r, const REAL *grams, const REAL *rhs, const double *shifts, const REAL *start,    \
             REAL *found, int threads) {                                                                              \
        const Packed packed = {r, grams, rhs, start, shifts, found};                                                  \
        Job job = {rows, 0, NAME##_rows, &packed};                                                                    \
        return run(&job, threads);                                                                                    \
    }

SOLVE_PACKED(solve_packed_f32, float, FLT_EPSILON)
SOLVE_PACKED(solve_packed_f64, double, DBL_EPSILON)
