# make            builds ./moe
# make run        trains a model on Shakespeare and lets it write (about 100 s on two cores)
# make test       builds and runs every test (under two minutes on two cores)
# make clean      removes what was built; out/, with the trained models, stays
#
# CC=clang, CFLAGS=... and OPENMP= (none) may be given. Results do not depend on them beyond rounding.

CC = cc
# what the compiler takes of: this machine's vector instructions, OpenMP or at least its simd part
try = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')
ARCH := $(or $(call try,-march=native),$(call try,-mcpu=native))
OPENMP := $(or $(call try,-fopenmp),$(call try,-fopenmp-simd))
# a*b+c may become one fma; libm's errno and traps are not wanted. No -ffast-math.
CFLAGS = -O3 $(ARCH) -ffp-contract=fast -fno-math-errno -fno-trapping-math
WARN = -std=c11 -Wall -Wextra -Wpedantic -Wno-pass-failed
BUILD = $(CC) $(WARN) $(CFLAGS) $(OPENMP)

DATA = tinyshakespeare/input.txt
EXCERPT = tinyshakespeare/excerpt.txt

moe: moe.c Makefile
	$(BUILD) -o $@ moe.c -lm

run: moe
	@said=$$(sh tinyshakespeare/fetch.sh 2>&1) || said="$$said; training on $(EXCERPT) instead"; \
	    test -z "$$said" || echo "$$said"
	./moe train --out out/shakespeare --data $$(test -f $(DATA) && echo $(DATA) || echo $(EXCERPT))

# The tests exist twice in one program: in float, as moe is, and in double, for gradients.
test_moe: test_moe.c moe.c Makefile
	@mkdir -p build
	$(BUILD) -DMOE_DOUBLE -c -o build/test_double.o test_moe.c
	$(BUILD) -c -o build/test_float.o test_moe.c
	$(BUILD) -o $@ build/test_float.o build/test_double.o -lm

test: moe test_moe
	./test_moe

clean:
	rm -rf build moe test_moe moe_gpu

.PHONY: run test clean
