# WaveKAN with real Morlet wavelets.
out_dir = "out-ablation/kan_morlet"
use_kan = True
kan_wavelet = "morlet"
