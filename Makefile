# make            builds ./moe
# make run        trains a model on Shakespeare and lets it write (a minute on two new cores)
# make best       the same with multi-token prediction and four times as many steps
# make r1         a model that answers badly teaches itself to think (two to seven minutes; SEED=2,
#                 TASK=countdown: learns to search; TASK=columns: learns to add longer numbers than
#                 it ever read about)
# make test       builds and runs every test (under two minutes on two cores)
# make gpu        builds ./moe_gpu, for the GPU of this machine or for GPU_ARCH=sm_90
# make emu        builds ./moe_emu: moe.cu by the C++ compiler, its kernels run on the CPU
# make verify     compares moe.cu with moe.c, on the GPU or, where there is none, as make emu
# make mpi        builds ./moe_mpi, for many machines: mpirun -np 4 ./moe_mpi train --accumulate 4 ...
# make scaling    how time grows with the sequence, the number of experts and threads
# make clean      removes what was built; out/, with the trained models, stays
#
# CC=clang, CFLAGS=... and OPENMP= (none) may be given. Results do not depend on them beyond rounding.
# PRECISION=fp32 makes gpu and emu compute in float instead of bfloat16; MPI=1 makes them run on
# many GPUs, with MPI and NCCL.

CC = cc
# what the compiler takes of: this machine's vector instructions; OpenMP (for Apple's clang that of
# Homebrew's libomp) or at least its simd part
try = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')
ARCH := $(or $(call try,-march=native),$(call try,-mcpu=native))
OPENMP := $(or $(call try,-fopenmp),$(foreach omp,$(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp),\
    $(call try,-Xpreprocessor -fopenmp -isystem $(omp)/include -L$(omp)/lib -lomp)),$(call try,-fopenmp-simd))
# a*b+c may become one fma; libm's errno and traps are not wanted. No -ffast-math.
CFLAGS = -O3 $(ARCH) -ffp-contract=fast -fno-math-errno -fno-trapping-math
WARN = -std=c11 -Wall -Wextra -Wpedantic -Wno-pass-failed
BUILD = $(CC) $(WARN) $(CFLAGS) $(OPENMP)

DATA = tinyshakespeare/input.txt
EXCERPT = tinyshakespeare/excerpt.txt

moe: moe.c Makefile
	$(BUILD) -o $@ moe.c -lm

# The same program, whose processes train one model together.
MPICC = mpicc
MPICXX = mpicxx
needs = @command -v $(1) >/dev/null || { echo "make $@: there is no $(1); install MPI, such as MPICH or" \
    "Open MPI, or say $(2)=..."; exit 1; }
mpi:
	$(call needs,$(MPICC),MPICC)
	$(MPICC) $(WARN) $(CFLAGS) $(OPENMP) -DMOE_MPI -o moe_mpi moe.c -lm

# What is seen often is learnt by heart unless the weights decay.
STEPS = 4000
RECIPE = --batch 8 --hold 0.3 --seq-warmup 0.33
run: TRAIN = --out out/shakespeare $(RECIPE) --steps 950
best: TRAIN = --config laptop-mtp --out out/best $(RECIPE) --steps $(STEPS) --weight-decay 0.5
run best: moe
	@said=$$(sh tinyshakespeare/fetch.sh 2>&1) || said="$$said; training on $(EXCERPT) instead"; \
	    test -z "$$said" || echo "$$said"
	./moe train $(TRAIN) --data $$(test -f $(DATA) && echo $(DATA) || echo $(EXCERPT))

# From random weights: a text of mixed quality to learn from, then rewards alone.
TASK = add
SEED = 1
add-text = --worked 0.25 --right 0.2
add-base = --seq 128 --steps 1000
add-asks = 347+586
countdown-text = --lines 300000 --worked 0.11 --right 0.03 --slips 0.12
countdown-base = --seq 384 --batch 6 --steps 2500
countdown-room = --max-tokens 448
countdown-votes = --votes 4
countdown-asks = 4,6,7=34
# Texts with five digits at most, first worked sums alone; four to seven in RL; nine nowhere.
columns-first = --size 1-5 --lines 100000 --worked 1 --slips 0.2 --seed 10$(SEED)
columns-first-base = --steps 2000
columns-text = --size 1-5 --lines 100000 --worked 0.25 --right 0.1 --slips 0.2
columns-base = --seq 256 --batch 10 --answers-only
columns-then = --steps 600 --lr 0.002 --adam-lr 0.008
columns-room = --size 6-7 --max-prompt 56 --max-tokens 200
columns-rl = --size 4-7 --steps 40 --lr 0.0003
columns-votes = --votes 4
columns-beyond = --size 9
columns-asks = "t:k48e.t76k.m19u.e35z.u61;.z02m"

r1: R1 = out/r1-$(TASK)-$(SEED)
r1: EVAL = ./moe eval --task $(TASK) $($(TASK)-room) $($(TASK)-votes) --temperature 0.6 --top-p 0.95
r1: TEXT = ./moe task --task $(TASK) --seed $(SEED)
r1: TRAIN = ./moe train $($(TASK)-base) --val-every 0 --tokens 0 --seed $(SEED)
r1: moe
	@mkdir -p $(R1)
	$(if $($(TASK)-first),$(TEXT) $($(TASK)-first) > $(R1)/first.txt)
	$(if $($(TASK)-first),$(TRAIN) $($(TASK)-first-base) --config laptop-r1 \
	    --data $(R1)/first.txt --out $(R1)/first)
	$(TEXT) $($(TASK)-text) > $(R1)/base.txt
	$(TRAIN) $(if $($(TASK)-first),--model $(R1)/first,--config laptop-r1) $($(TASK)-then) \
	    --data $(R1)/base.txt --out $(R1)/base
	$(EVAL) --model $(R1)/base
	$(if $($(TASK)-beyond),$(EVAL) $($(TASK)-beyond) --model $(R1)/base)
	./moe rl --task $(TASK) --model $(R1)/base $($(TASK)-room) $($(TASK)-rl) --seed $(SEED) \
	    --out $(R1)/rl
	$(EVAL) --model $(R1)/rl
	$(if $($(TASK)-beyond),$(EVAL) $($(TASK)-beyond) --model $(R1)/rl)
	@for model in base rl; do printf '\n%s: %s\n' $$model $($(TASK)-asks); \
	    ./moe sample --task $(TASK) $($(TASK)-room) --prompt $($(TASK)-asks) --temperature 0 \
	        --model $(R1)/$$model 2>/dev/null; done

# The tests exist twice in one program: in float, as moe is, and in double, for gradients.
test_moe: build/test_float.o build/test_double.o
	$(BUILD) -o $@ build/test_float.o build/test_double.o -lm

build/test_%.o: test_moe.c moe.c Makefile
	@mkdir -p build
	$(BUILD) $(if $(filter double,$*),-DMOE_DOUBLE) -c -o $@ test_moe.c

# Kernels run on the CPU under Linux only.
EMULATION := $(if $(filter Linux,$(shell uname)),$(shell command -v $(CXX)))
test: moe test_moe $(if $(EMULATION),build/test_cuda_on_cpu verify)
	$(if $(EMULATION),./build/test_cuda_on_cpu)
	./test_moe

PRECISION = bf16
NVCC := $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
    sed -n '1s/\([0-9]*\)\.\([0-9]\)/sm_\1\2/p')
# Hopper, sm_90, has instructions of its own (sm_90a), as the emulation; HOPPER= does without.
HOPPER = -DMOE_HOPPER
SM_90A = -gencode arch=compute_90a,code=sm_90a $(HOPPER)
CUDA = $(NVCC) -std=c++17 -O3 $(if $(filter sm_90 sm_90a,$(GPU_ARCH)),$(SM_90A),-arch=$(GPU_ARCH)) \
    -Xcompiler "$(filter -fopenmp,$(OPENMP))" -diag-suppress 177,550
EMULATE = $(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas $(HOPPER)
FLOAT = $(if $(filter fp32,$(PRECISION)),-DMOE_FP32)

gpu:
	$(if $(MPI),$(call needs,$(MPICXX),MPICXX))
	@test -n "$(NVCC)" || { echo "make gpu: there is no nvcc; the CUDA Toolkit 12 or 13 has it" \
	    "(in PATH or /usr/local/cuda)"; exit 1; }
	@test -n "$(GPU_ARCH)" || { echo "make gpu: nvidia-smi finds no GPU here; GPU_ARCH=sm_90 says" \
	    "for which one to build (90: H100, 100: B200, 80: A100, 89: RTX 4090)"; exit 1; }
	@echo '#include <cublas_v2.h>' | $(NVCC) -x cu -E - >/dev/null 2>&1 || { echo "make gpu:" \
	    "$(NVCC) finds no cublas_v2.h; install cuBLAS's development files"; exit 1; }
	@test -z "$(MPI)" || echo '#include <nccl.h>' | $(NVCC) -x cu -E - >/dev/null 2>&1 || { echo \
	    "make gpu: $(NVCC) finds no nccl.h; install NCCL's development files"; exit 1; }
	@case $(PRECISION):$(GPU_ARCH) in bf16:sm_[0-7]?) echo "make gpu: $(GPU_ARCH) has no bfloat16" \
	    "tensor cores; PRECISION=fp32 does without"; exit 1;; esac
	$(CUDA) $(FLOAT) $(if $(MPI),-ccbin $(MPICXX) -DMOE_MPI) -o moe_gpu moe.cu -lcublas \
	    $(if $(MPI),-lnccl)

emu:
	$(if $(MPI),$(call needs,$(MPICXX),MPICXX))
	$(if $(MPI),$(EMULATE:$(CXX)%=$(MPICXX)%) -DMOE_MPI,$(EMULATE)) $(FLOAT) -x c++ -o moe_emu \
	    moe.cu -lm

# The same tests on both sides, each compiled with its operations.
ON_GPU := $(and $(NVCC),$(GPU_ARCH))
LAPTOP = $(if $(ON_GPU),-DVERIFY_LAPTOP)
verify: build/verify_fp32 build/verify_bf16
	@./build/verify_fp32
	@./build/verify_bf16

build/verify_cpu.o: .ci/verify.c moe.c Makefile
	@mkdir -p build
	$(BUILD) $(LAPTOP) -c -o $@ .ci/verify.c

build/verify_%: build/verify_cpu.o .ci/verify.c moe.c moe.cu $(wildcard .ci/*.h) Makefile
	$(if $(ON_GPU),$(CUDA) -x cu,$(EMULATE) -x c++) $(if $(filter fp32,$*),-DMOE_FP32) \
	    $(LAPTOP) -DVERIFY_GPU -I. -c -o $@.o .ci/verify.c
	$(if $(ON_GPU),$(CUDA),$(CXX) $(OPENMP)) -o $@ build/verify_cpu.o $@.o \
	    $(if $(ON_GPU),-lcublas) -lm

# That what kernels run on without a GPU does as CUDA does, and catches the bugs it says.
build/test_cuda_on_cpu: .ci/test_cuda_on_cpu.cpp $(wildcard .ci/*.h)
	@mkdir -p build
	$(EMULATE) -I.ci -o $@ .ci/test_cuda_on_cpu.cpp

# How a step's time grows with sequence, experts and threads (about a minute).
scaling: moe
	@.ci/scaling

clean:
	rm -rf build moe test_moe moe_gpu moe_emu moe_mpi

.PHONY: run best r1 test mpi gpu emu verify scaling clean
