# The control: GPT-2's block as it is. python train.py config/train_shakespeare_char_cpu.py config/ablation/baseline.py
out_dir = "out-ablation/baseline"
