# The published Wav-KAN layer with wavelet "morlet"; slow.
out_dir = "out-ablation/kan_edge_morlet"
use_kan = True
kan_edges = "edge"
kan_wavelet = "morlet"
