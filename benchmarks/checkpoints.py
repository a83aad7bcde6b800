"How long one checkpoint takes, and what it costs on a rented card. The last line is one JSON object."
import argparse,json,tempfile,time
from pathlib import Path
import torch
from torch import nn
from deepfake_nb.checkpoints import damage,latest,load_checkpoint,save_checkpoint

class Flat(nn.Module):
    "A model of `n` million parameters in 64 tensors"
    def __init__(self, n): super().__init__(); self.cfg = dict(n=n); self.w = nn.ParameterList([nn.Parameter(torch.randn(int(n*1e6/64))) for _ in range(64)])

def timed(f, n):
    "The median of `n` times, s"
    ts = []
    for _ in range(n): t = time.perf_counter(); f(); ts.append(time.perf_counter()-t)
    return sorted(ts)[n//2]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--millions', type=float, default=17.55, help='parameters; 17.55 is EfficientNet-B4 with one logit'); p.add_argument('--repeat', type=int, default=5)
    a = p.parse_args(); torch.set_num_threads(1); torch.manual_seed(0)
    m = Flat(a.millions); opt = torch.optim.AdamW(m.parameters())
    for w in m.w: w.grad = torch.randn_like(w)
    opt.step(); state = dict(cursor=0, optimizer=opt.state_dict())
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); step = [0]
        def save(): step[0] += 1; save_checkpoint(d/'ck', step[0], m, state)
        res = dict(millions=a.millions, save_s=timed(save, a.repeat))
        t = time.process_time(); save(); res['save_cpu_s'] = time.process_time()-t
        res['naive_torch_save_s'] = timed(lambda: torch.save(dict(model=m.state_dict(), **state), d/'naive.pt'), a.repeat)
        f = latest(d/'ck'); res['verify_s'] = timed(lambda: damage(f.folder, f.stem), a.repeat); res['load_s'] = timed(lambda: load_checkpoint(f, m), a.repeat)
        res['bytes'] = sum(x['bytes'] for x in f.manifest['files'].values()); res['naive_bytes'] = (d/'naive.pt').stat().st_size
    res['ratio_to_naive'] = res['save_s']/res['naive_torch_save_s']
    res['share_of_training_at_10_minutes'] = res['save_s']/600
    for k,v in res.items(): print(f'{k:34} {v:.6g}')
    print(json.dumps(res))

if __name__=='__main__': main()
