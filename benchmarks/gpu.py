"What only a card can tell: the same answers as on a CPU, and time and memory of a step at the real sizes. The last line is one JSON object; without a card it says so and measures nothing."
import argparse,json,sys,time
from contextlib import nullcontext
from dataclasses import replace
import numpy as np,torch
from deepfake_nb.batches import Batch,normalise
from deepfake_nb.losses import stf_loss
from deepfake_nb.specialists.base import MODULES,SpecialistConfig
from deepfake_nb.specialists.team import build_specialist
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba

def batch(n, T, size, seed=0, native=0, sound=False):
    "Bytes as a loader gives them: n/2 reals, n/2 fakes, of smooth noise"
    g = torch.Generator().manual_seed(seed); low = torch.rand(n, T, 3, 14, 14, generator=g)
    frames = (torch.nn.functional.interpolate(low.flatten(0, 1), (size,size), mode='bilinear').unflatten(0, (n,T))*255+8*torch.randn(n, T, 3, size, size, generator=g)).clamp(0, 255).to(torch.uint8)
    marks = 60+100*torch.rand(n, 1, 468, 2, generator=g).expand(n, T, 468, 2); label = torch.arange(2).repeat_interleave(n//2)
    more = dict(native=[torch.randint(0, 256, (T,3,native,native), generator=g, dtype=torch.uint8) for _ in range(n)], offset=[torch.zeros(T, 2, dtype=torch.int64)]*n) if native else {}
    h = native or size; more['face'] = [torch.full((T,h,h), 255, dtype=torch.uint8)]*n
    if sound: more['sound'] = [torch.randn(640*T, generator=g)*.1 for _ in range(n)]
    return Batch(frames, None, marks.float().contiguous(), torch.arange(T).double().expand(n, T)/25, label, ['a']*n, torch.arange(n//2).repeat(2), ['g']*n, [0]*n, **more)

def sync(device): torch.cuda.synchronize() if device=='cuda' else None

def answers(model, b, device, bf16=False):
    "Logits of a batch and the gradient of the first parameter that learns, on the CPU"
    m = model.to(device).eval(); m.zero_grad(); b = b.to(device)
    with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
        out = m(b).logits if hasattr(m, 'module') else m(normalise(b, m.mean, m.std).frames)['logits']
    out.float().diff(dim=1).sum().backward()
    p = next(p for p in reversed(list(m.parameters())) if p.requires_grad and p.grad is not None and p.ndim>1)
    return out.detach().float().cpu().clone(),p.grad.float().cpu().clone() # a gradient moves with its parameter

def parity(device):
    "Largest difference of logits and of a gradient, in units of the largest number: float32 and bf16 against the CPU"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False; res = {}
    models = {n:(lambda c=c: build_stf_mamba(c, 'random'), batch(4, 8, 224)) for n,c in (('Phase A', replace(STFConfig.phase_a('demo'), dropout=0.)),('Phase B', replace(STFConfig.phase_b('demo'), dropout=0.)))}
    for code in MODULES: models[code] = (lambda code=code: build_specialist(SpecialistConfig(code, 'tf_efficientnet_lite0'), 'random')),batch(4, max(4, MODULES[code].needs.frames), 224, native=256*(MODULES[code].needs.pixels=='native'), sound=MODULES[code].needs.sound)
    for name,(make,b) in models.items():
        torch.manual_seed(0); m = make(); here = answers(m, b, 'cpu')
        res[name] = {k:[round(((x-y).abs().max()/y.abs().max()).item(), 7) for x,y in zip(answers(m, b, device, k=='bf16'), here)] for k in ('fp32','bf16')}
        print(f'{name:8} logits and gradient against the CPU: fp32 {res[name]["fp32"]}, bf16 {res[name]["bf16"]}', flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return res

def stepping(model, loss, b, device, accumulate, rounds):
    "Median seconds of an optimiser step in bf16, and the peak of memory in GB"
    model.to(device).train(); opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4); took = []
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        sync(device); t = time.perf_counter()
        for _ in range(accumulate):
            with torch.autocast(device, torch.bfloat16): l = loss(model, b.to(device))
            (l/accumulate).backward()
        opt.step(); opt.zero_grad(); sync(device); took.append(time.perf_counter()-t)
    return float(np.median(took[1:])),torch.cuda.max_memory_allocated()/1e9 if device=='cuda' else float('nan')

def sizes(device, small):
    "The full presets on real sizes, data not counted"
    def stf(m, b): o = m(normalise(b, m.mean, m.std).frames); return stf_loss(o, b.label, b.pair, m.cfg.hll_loss, .1)['loss']
    def spec(m, b): return torch.nn.functional.cross_entropy(m(b).logits.float(), b.label)
    T,res = (4,{}) if small else (32,{})
    for name,cfg in (('Phase A', STFConfig.phase_a('demo' if small else 'full')),('Phase B', STFConfig.phase_b('demo' if small else 'full'))):
        for how,kw in (('',{}),(', no checkpointing',dict(checkpointing=False))):
            s,gb = stepping(build_stf_mamba(replace(cfg, **kw), 'random'), stf, batch(4, T, 224), device, 4, 3 if small else 6); res[name+how] = dict(s_a_step=round(s, 4), clips_a_step=16, GB=round(gb, 2)); print(name+how, res[name+how], flush=True)
    for code in ('CM','TM','RR'):
        n = 4 if small else 32; s,gb = stepping(build_specialist(SpecialistConfig(code, 'tf_efficientnet_lite0' if small else 'efficientnet_b4'), 'random'), spec, batch(n, max(2, MODULES[code].needs.frames), 224, native=256*(MODULES[code].needs.pixels=='native')), device, 1, 3 if small else 8)
        res[code] = dict(s_a_step=round(s, 4), clips_a_second=round(n/s, 1), GB=round(gb, 2)); print(code, res[code], flush=True)
    return res

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__); p.add_argument('--device', default='cuda', choices=['cuda','cpu'], help='cpu tries the script itself, at toy size'); a = p.parse_args()
    if a.device=='cuda' and not torch.cuda.is_available(): print(json.dumps(dict(skipped='no CUDA device'))); sys.exit()
    name = torch.cuda.get_device_name() if a.device=='cuda' else 'cpu'
    print(json.dumps(dict(device=name, torch=torch.__version__, parity=parity(a.device), sizes=sizes(a.device, a.device=='cpu'))))
