# Everything runs in a virtual environment that the targets make and fill themselves.
PYTHON ?= python3
VENV ?= .venv

# Runs that end within minutes on a CPU. They show that training runs, not that it helps.
DEMO_FLAGS ?= --input_size 48 48 24 --spacing 2 2 4 --local_crops_scale 0.75 --local_crops_number 4 --out_dim 1024 \
	--batch_size_per_gpu 32 --patches_per_volume 160 --epochs 10 --warmup_epochs 2 --lr 0.004 --drop_path_rate 0 \
	--teacher_temp 0.06 --warmup_teacher_temp_epochs 4 --log_every 5

LNC_DEMO_FLAGS ?= --folds subsets --epochs 5 --batch_size_per_gpu 8
LTS_DEMO_FLAGS ?= --k_fold 2 --num_test 2 --epochs 6 --val_freq 6 --warmup_epochs 1 --patches_per_case 8 \
	--foreground_share 0.9 --batch_size_per_gpu 4 --lr 0.003
# Three copies of one case: what a fold is trained on is what it is tested on, so that a lesion is learnt by heart
LESION_DEMO_FLAGS ?= --k_fold 2 --num_test 1 --epochs 5 --warmup_epochs 0.5 --patches_per_case 40 --foreground_share 0.8 \
	--batch_size_per_gpu 2 --lr 0.002 --drop_path_rate 0 --use_rotation false --use_scale false --use_flip false

# Four arms, two seeds, three tasks in minutes: they show that the study runs, not what the paper's would show
STUDY_FLAGS ?= --arms none paper scratch random --seeds 0 1
STUDY_PRETRAIN_FLAGS ?= --arch vit_micro --patch_size 6 6 6 --input_size 24 24 24 --spacing 2.5 2.5 2.5 \
	--local_crops_scale 0.5 --local_crops_number 4 --clip_range -1000 400 --out_dim 256 --head_hidden_dim 512 \
	--head_bottleneck_dim 128 --batch_size_per_gpu 32 --patches_per_volume 16 --epochs 10 --warmup_epochs 1 \
	--lr 0.0008 --lr_unscaled --drop_path_rate 0 --saveckp_freq 0
STUDY_LNC_FLAGS ?= --folds subsets --epochs 6 --batch_size_per_gpu 16 --warmup_epochs 1 --drop_path_rate 0
STUDY_LTS_FLAGS ?= --k_fold 2 --num_test 2 --epochs 3 --val_freq 3 --warmup_epochs 0.5 --patches_per_case 16 \
	--foreground_share 0.9 --overlap 0 --batch_size_per_gpu 4 --lr 0.003 --drop_path_rate 0 \
	--use_rotation false --use_scale false --use_flip false

PIP_INSTALL = "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check
RUNTIME = $(VENV)/.runtime-installed
TEST = $(VENV)/.test-installed

.DEFAULT_GOAL := help
.PHONY: help demo study results results-all test lint clean-demo

help:
	@echo "make demo        install, fetch two lung CTs, pre-train a small model, fine-tune it and learn one lesion by heart (demo/)"
	@echo "make study       install, make 20 synthetic chests, and compare four ways to pre-train on them (demo/study/)"
	@echo "make results     the README's main table (results/classification) once more: published weights, and one seed pre-trained anew (DATA=../shared/data or LUNA16)"
	@echo "make results-all what results/ lacks of its tables: says how long first (hours), and resumes"
	@echo "make test        install and run the tests"
	@echo "make lint        install and check the code's format (ruff)"
	@echo "make clean-demo  delete demo/"
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=.venv the virtual environment, DEMO_FLAGS=..., LNC_DEMO_FLAGS=...,"
	@echo "LTS_DEMO_FLAGS=... and LESION_DEMO_FLAGS=... the demo's runs; STUDY_FLAGS=..., STUDY_PRETRAIN_FLAGS=..., STUDY_LNC_FLAGS=... and"
	@echo "STUDY_LTS_FLAGS=... the study's"

# One process each: plain python, no torchrun
demo: $(RUNTIME)
	"$(VENV)/bin/python" prepare_data.py demo --output demo/data
	"$(VENV)/bin/python" main_dino.py --arch vit_tiny \
		--data_dir demo/data/pretrain --output_dir demo/pretrain $(DEMO_FLAGS)
	"$(VENV)/bin/python" main_lnc_luna16.py --pretrained_weights demo/pretrain/checkpoint.pth \
		--data_dir demo/data/luna16 --output_dir demo/lnc $(LNC_DEMO_FLAGS)
	"$(VENV)/bin/python" main_lts_msd.py --pretrained_weights demo/pretrain/checkpoint.pth \
		--data_dir demo/data/msd --output_dir demo/lts $(LTS_DEMO_FLAGS)
	"$(VENV)/bin/python" main_lts_msd.py --pretrained_weights demo/pretrain/checkpoint.pth \
		--data_dir demo/data/lesion --output_dir demo/lesion $(LESION_DEMO_FLAGS)
	@printf '%s\n' "" "The demo is done. To look at (which scans are SYNTHETIC: demo/data/SOURCE.txt):" \
		"  $$(ls demo/lesion/0/overlays/*.png | head -1)  a lesion learnt by heart (the Dice above): trained and tested on" \
		"      copies of one scan, on purpose. It shows that training works, and says nothing about other patients" \
		"  demo/pretrain/views.png, augmentations.png  what pre-training sees of two scans" \
		"  demo/lnc/curves.png, errors.png  nodules against lung, each scan tested by a model that has not seen it" \
		"  demo/lts/0/overlays/  lesions of scans that the model has not seen: ten scans can't teach that, and the Dice says so"

study: $(RUNTIME)
	"$(VENV)/bin/python" prepare_data.py phantoms --output demo/study/phantoms
	"$(VENV)/bin/python" prepare_data.py demo --phantom --output demo/study/masks
	"$(VENV)/bin/python" study.py --output_dir demo/study/result --data_dir demo/study/phantoms/pretrain \
		--classification demo/study/phantoms/luna16 --probe demo/study/phantoms/luna16 \
		--segmentation demo/study/masks/msd $(STUDY_FLAGS) --pretrain_flags="$(STUDY_PRETRAIN_FLAGS)" \
		--classification_flags="$(STUDY_LNC_FLAGS)" --segmentation_flags="$(STUDY_LTS_FLAGS)" \
		--probe_flags="--pool cls+mean"
	@printf '%s\n' "" "The study is done. To look at:" \
		"  demo/study/result/report.html  tables, figure and the paper's claims; intervals hold what few patients and seeds leave open" \
		"  demo/study/result/arms/paper/seed0/pretrain/views.png  what pre-training sees of a synthetic chest"

# DATA, WORK and SEEDS as results/study_of_halves.sh has them. The published weights, and one seed pre-trained anew
results: $(RUNTIME)
	SEEDS="$${SEEDS:-0}" OUT=evidence/repeated PYTHON="$(VENV)/bin/python" \
		results/classification.sh ARMS="published nodules random scratch"
	@printf '%s\n' "" "Repeated: evidence/repeated/classification/results.md; beside what is kept:"
	"$(VENV)/bin/python" results/repeated.py --kept results/classification --repeated evidence/repeated/classification

# epochs.sh, rates.sh and label_fractions.sh take the encoders that classification.sh leaves
results-all: $(RUNTIME)
	for NAME in classification class_token pretraining augmentations; do PYTHON="$(VENV)/bin/python" results/$$NAME.sh --plan || exit 1; done
	for NAME in classification class_token epochs rates label_fractions pretraining augmentations; do PYTHON="$(VENV)/bin/python" results/$$NAME.sh || exit 1; done
	! test -f "$${DATA:-../shared/data}/nodules/nodules_51mm.npz" || PYTHON="$(VENV)/bin/python" results/segmentation.sh
	"$(VENV)/bin/python" results/together.py --results results

# Two at a time, each file by one process; one thread each: threads of several processes wait for one another
test: $(TEST)
	OMP_NUM_THREADS=1 "$(VENV)/bin/python" -m pytest -n 2 --dist loadfile tests

lint: $(TEST)
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .

clean-demo:
	rm -rf demo

$(RUNTIME): requirements.txt $(VENV)/.created
	@echo "installing requirements.txt into $(VENV) (minutes and gigabytes the first time)"
	@$(PIP_INSTALL) -r requirements.txt
	@touch "$@"

$(TEST): requirements-test.txt $(RUNTIME)
	@echo "installing requirements-test.txt into $(VENV)"
	@$(PIP_INSTALL) -r requirements-test.txt
	@touch "$@"

# The stamp, not the interpreter, says that the environment is whole: venv puts pip in last.
$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { echo "error: no $(PYTHON) found: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $(PYTHON) is older than Python 3.11: name a newer one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2> /dev/null || { echo "error: $(PYTHON) lacks the modules venv and ensurepip (Debian and Ubuntu: install python3-venv), or name another with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)"
	@touch "$@"
