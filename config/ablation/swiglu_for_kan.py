# Over a preset with WaveKAN: SwiGLU instead. python train.py config/presets/nano.py config/ablation/swiglu_for_kan.py
out_dir = "out-ablation/swiglu_for_kan"
use_kan = False
use_swiglu = True
