# The published Wav-KAN layer with wavelet "gaus1" (there "dog"); slow.
out_dir = "out-ablation/kan_edge_gaus1"
use_kan = True
kan_edges = "edge"
kan_wavelet = "gaus1"
