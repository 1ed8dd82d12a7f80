#!/usr/bin/env bash
# What a GPU that nobody has met yet is asked first, within 8 minutes; each answer lies in a file before the next question.
#
#   bash benchmarks/device.sh OUT [WHEELS]
#
# OUT gets smoke.txt (a tiny run on the GPU: prepared, trained, killed, resumed, exported), stage2.md and stage1.md
# (throughput.py: variants at full size, what is expected to gain most first, each with the memory that the memory model
# counts; a step that waits for the GPU fails), encoding.md (preparation beside the VAE alone) and device.txt.
# WHEELS is a folder of wheels for what this Python lacks, such as diffusers; PYTHON another Python than python3.
# Without a GPU it rehearses: the same questions of the CPU, with tiny widths.
set -u
export OMP_WAIT_POLICY=PASSIVE # threads that spin while they wait disturb what else runs
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
wheels=${2:-}
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -n "$wheels" ]; then
	"$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$wheels"/*.whl || exit 2
	export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

ask() { # seconds, file, command...: its output in the file, and the last lines of it here
	limit=$1 file=$out/$2
	shift 2
	began=$(date +%s)
	timeout --kill-after=5 "$limit" "$@" >"$file.part" 2>&1
	code=$?
	mv "$file.part" "$file"
	echo "== $(basename "$file"): exit code $code after $(($(date +%s) - began)) s"
	tail -n 25 "$file"
}

smoke() { # the demo's first stage for a few steps, in bf16, on the GPU
	set -e
	demo="configs/demo_stage1.yaml model.pretrained=$work/base data.shards=$work/shards run.output_dir=$work/runs
		data.global_batch_size=4 data.bucket_batch_size=2 data.micro_batch_size=2 precision.compute=bf16
		precision.frozen=bf16 schedule.max_steps=8 checkpoint.every_steps=4"
	"$python" scripts/make_tiny_base.py "$work/base"
	"$python" scripts/build_shards.py $demo
	"$python" train.py $demo run.name=straight
	"$python" train.py $demo run.name=killed &
	training=$!
	while [ ! -d "$work/runs/killed/checkpoints/step-00000004" ] && kill -0 $training; do sleep 0.05; done
	kill -9 $training && wait $training || true
	"$python" train.py $demo run.name=killed
	for mode in master stochastic; do "$python" train.py $demo run.name=$mode precision.weights=$mode; done
	"$python" scripts/compare_runs.py "$work"/runs/* --out "$work/compare.html" || true
	"$python" scripts/export.py "$work/runs/straight"
	sha256sum "$work"/runs/*/checkpoints/step-00000008/*.safetensors
}

size="--micro-batch 4" images="--images 32 --side 1024 --per-shard 32 --rounds 2 --processes 4 --dtype fp16"
gigabytes=$("$python" -c 'import torch
print(torch.cuda.get_device_properties(0).total_memory // 10**9 if torch.cuda.is_available() else 0)') || exit 2
if [ "$gigabytes" -ge 75 ]; then size="--micro-batch 16"; fi
if [ "$gigabytes" -eq 0 ]; then size="--tiny --side 128" images="--images 4 --side 64"; fi
ask 20 device.txt sh -c "nvidia-smi; \"$python\" -m torch.utils.collect_env | sed /^Vulnerab/d"
export -f smoke && export work python
ask 110 smoke.txt bash -c smoke
for stage in 2 1; do
	ask 150 stage$stage.log "$python" benchmarks/throughput.py --stage $stage $size --rounds 1 --steps 3 --limit 70 \
		--budget 100 --out "$out/stage$stage.md"
done
"$python" benchmarks/random_sdxl.py "$work/vae" --vae && ask 60 encoding.md \
	"$python" benchmarks/encoding.py "$work/vae" $images
echo "all of it lies in $out"
