"What a specialist costs: its module beside EfficientNet-B4 alone, forward and in a training step; fixed maps against plain NumPy; 8-bit AdamW against AdamW. Ratios of one run, calls of a round one after the other; the last line is one JSON object"
import argparse,json,statistics,time
import numpy as np,scipy.fft,scipy.ndimage,torch
import torch.nn.functional as F
from deepfake_nb.batches import Batch
from deepfake_nb.optimizers import AdamW8bit
from deepfake_nb.specialists.base import SpecialistConfig
from deepfake_nb.specialists.bg import residual_filters,residuals
from deepfake_nb.specialists.cm import block_dct
from deepfake_nb.specialists.proof import make_pair,photos
from deepfake_nb.specialists.team import MODULES,ORDER,build_specialist

def medians(calls, n):
    "Median milliseconds of each call: `n` rounds after one for warming up"
    times = {k:[] for k in calls}
    for _ in range(n+1):
        for k,f in calls.items(): sync(); t = time.perf_counter(); f(); sync(); times[k].append((time.perf_counter()-t)*1000)
    return {k:statistics.median(v[1:]) for k,v in times.items()}

def sync():
    if torch.cuda.is_available(): torch.cuda.synchronize()

def a_batch(code, B, device):
    "Clips of noise, 224 pixels, native patches of 224"
    n,r = MODULES[code].needs,lambda *s: torch.randint(0, 256, s, dtype=torch.uint8); T = n.frames
    return Batch(r(B,T,3,224,224), None, 100+20*torch.rand(B,T,468,2), torch.arange(T).expand(B, T)/25., torch.arange(B)%2, ['x']*B, torch.arange(B), ['x']*B, [0]*B,
        native=[r(T,3,224,224)]*B, offset=[torch.zeros(T,2)]*B, face=[r(T,224,224)]*B, sound=[.1*torch.randn(640*T)]*B).to(device)

def steps(code, B, device, rounds):
    "A training step of the whole, of the backbone with a plain classifier, and the module's forward pass alone"
    model = build_specialist(SpecialistConfig(code), 'random').to(device).train(); b,head = a_batch(code, B, device),torch.nn.Linear(1792, 2).to(device)
    def go(logits): F.cross_entropy(logits, b.label).backward(); model.zero_grad(set_to_none=True)
    def alone():
        with torch.no_grad(): model.module_map(b)
    return medians(dict(whole=lambda: go(model(b).logits), plain=lambda: go(head(model.backbone(b.frames[:,b.frames.shape[1]//2]).mean((2,3)))), module=alone), rounds)

def against_numpy(rounds):
    "Sixteen pictures: a straightforward loop over them, and ours"
    y = torch.cat([make_pair('BG', p, np.random.default_rng(0)).still.mean(1) for p in list(photos().values())[:8]]); z,k = y.numpy(),residual_filters()
    loops = dict(dct=lambda: [[scipy.fft.dctn(im[i:i+8,j:j+8]-128, norm='ortho') for i in range(0, 224, 8) for j in range(0, 224, 8)] for im in z],
        residuals=lambda: [[scipy.ndimage.correlate(im, w.numpy(), mode='mirror') for w in k] for im in z])
    got = medians(loops|dict(our_dct=lambda: block_dct(y), our_residuals=lambda: residuals(y, k)), rounds)
    return {f'{n} times faster':round(got[n]/got[f'our_{n}'], 1) for n in loops}

def optimizers(rounds):
    "A step of both on as many weights as a specialist has"
    ps = {k:[torch.nn.Parameter(torch.randn(24, 1024, 1000))] for k in 'ab'}
    for v in ps.values(): v[0].grad = torch.randn_like(v[0])
    opts = dict(AdamW=torch.optim.AdamW(ps['a']), AdamW8bit=AdamW8bit(ps['b']))
    return {k:round(v) for k,v in medians({k:o.step for k,o in opts.items()}, rounds).items()}

p = argparse.ArgumentParser(description=__doc__); p.add_argument('--batch', type=int, default=2); p.add_argument('--rounds', type=int, default=5); p.add_argument('--threads', type=int, default=1); a = p.parse_args()
torch.set_num_threads(a.threads); device,out = 'cuda' if torch.cuda.is_available() else 'cpu',{}
for c in ORDER:
    m = steps(c, a.batch, device, a.rounds)
    out[c] = {'module ms a clip':round(m['module']/a.batch, 1), 'step over plain backbone':round(m['whole']/m['plain'], 3), 'ms a step':round(m['whole'])}; print(c, out[c], flush=True)
print(json.dumps(dict(device=device, batch=a.batch, steps=out, numpy=against_numpy(a.rounds), optimizer_ms=optimizers(3))))
