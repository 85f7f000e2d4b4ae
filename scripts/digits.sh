#!/bin/sh
# Everything on digits that results/ shows, again: hours on 2 CPU cores; a second call goes on where it stopped.
#   PYTHON=.venv/bin/python sh scripts/digits.sh        (make results)
set -e
PYTHON=${PYTHON:-python}
HERE=$(dirname "$0")
run() { "$PYTHON" "$HERE/../run.py" "$@"; }
script() { name=$1; shift; "$PYTHON" "$HERE/$name.py" "$@"; }

run experiment=demo
run experiment=demo method=mgd3 guidance.stop_t=0
script report folder=runs/demo by=guidance.stop_t

run experiment=digits_guidance
script report folder=runs/digits_guidance picture=runs/digits_guidance/overview.png

PARITY=runs/parity
run experiment=parity ipc=2,5,10,20
run experiment=parity ipc=2,5,10,20 method=mgd3 modes=true_digits
run experiment=parity ipc=2,5,10,20 method=closest_real,herding,k_center seed=0 student_seeds=20
script measure images=$PARITY dataset=digits_parity metrics=coverage by=modes
script compare "folders=[$PARITY]" by=modes markdown=$PARITY/compare.md

run experiment=parity_map
run experiment=parity_map guidance.scale=0 guidance.stop_t=25
script map_guidance runs/parity_map dataset=digits_parity metrics=coverage

METHODS=runs/digits_methods
run experiment=digits_methods
run experiment=digits_methods method=first_files,closest_real,herding,k_center seed=0 student_seeds=10
run method=full tracker=none runs=$METHODS report=false student_seeds=5
for method in "$METHODS"/digits/*/; do
  case $method in */full/) students=1 ;; *) students=2 ;; esac
  script evaluate "images=$method" dataset=digits protocol=soft_label_short student_seeds=$students
done
for method in "$METHODS"/digits/*/ipc10; do
  script evaluate "images=$method" dataset=digits protocol=hard_label_noaug student_seeds=2
done
script compare "folders=[$METHODS]" markdown=$METHODS/compare.md
script measure images=$METHODS dataset=digits
script report folder=$METHODS

run experiment=digits_finetuning
run -m dataset=digits method=unguided ipc=10 'seed=range(0,5)' student_seeds=2 tracker=none report=false runs=runs/digits_finetuning
script compare folders=runs/digits_finetuning by=finetune.loss_sum
script measure images=runs/digits_finetuning dataset=digits metrics=pixels by=finetune.loss_sum

run experiment=digits_precision
script compare runs/digits_precision by=training_precision

FIELD=runs/digits_field
TERMS="by=[guidance.influence.k,guidance.deviation.gamma,guidance.push,refine,guidance.scale]"
run experiment=digits_field ipc=1,10,20
run experiment=digits_field ipc=10 method=igd guidance.deviation.gamma=1.875
run experiment=digits_field ipc=1,10,20 method=dap guidance.scale=0.03
run experiment=digits_field ipc=1,10,20 method=rded method.factor=1
run experiment=digits_field method=igd guidance.influence.k=0
run experiment=digits_field method=igd guidance.deviation.gamma=0
run experiment=digits_field method=manifoldgd guidance.push=0
run experiment=digits_field method=cao2 refine=none
script evaluate images=$FIELD dataset=digits protocol=hard_label_adamw protocol.epochs=300 student_seeds=2
script evaluate images=$FIELD dataset=digits protocol=soft_label_short student_seeds=2
script compare $FIELD "$TERMS" markdown=$FIELD/compare.md
script measure $FIELD dataset=digits "$TERMS"
script image_shifts $FIELD "$TERMS"

run experiment=digits_modes
script report folder=runs/digits_modes by=modes plot=runs/digits_modes/sweep.png
run experiment=digits_stop_t
script report folder=runs/digits_stop_t by=guidance.stop_t plot=runs/digits_stop_t/sweep.png
run experiment=digits_scale
script report folder=runs/digits_scale by=guidance.scale plot=runs/digits_scale/sweep.png
