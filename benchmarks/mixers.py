"Hydra's mixer and block: loop, dense and chunked form, forward and backward; the last line is one JSON object"
import argparse,json,statistics,time
import torch
import torch.nn.functional as F
from deepfake_nb.hydra import Hydra,quasiseparable

LENGTHS = (8,16,32,64,128,256,512)

def draw(B, T, K, P, N, device, dtype=torch.float32):
    "Arguments of `quasiseparable`, one group, steps as in a trained block"
    g = torch.Generator().manual_seed(0); r = lambda *s: torch.randn(*s, generator=g).to(device, dtype)
    args = r(B,T,K,P),F.softplus(r(2,B,T,K)-3),-torch.ones(K, device=device, dtype=dtype),r(2,B,T,1,N)/N**.5,r(2,B,T,1,N)/N**.5,r(B,T,K)
    return [v.requires_grad_() for v in args]

def medians(calls, n, device):
    "Median and least milliseconds of each call: `n` rounds after one for warming up, the calls of a round one after the other, so that noise hits all alike"
    times = {k:[] for k in calls}
    for _ in range(n+1):
        for k,f in calls.items():
            if device=='cuda': torch.cuda.synchronize()
            t = time.perf_counter(); f()
            if device=='cuda': torch.cuda.synchronize()
            times[k].append((time.perf_counter()-t)*1000)
    return [{k:round(f(v[1:]), 3) for k,v in times.items()} for f in (statistics.median, min)]

def ways(a, T):
    "name -> (form, backend, compiled) of all that is measured at T frames"
    res = dict(dense=('dense','torch',False), chunked=('chunked','torch',False))
    if T<=a.loop_max: res['loop'] = ('loop','torch',False)
    if a.device=='cuda': res['dense_compiled'] = ('dense','torch',True)
    if a.backend=='mamba_ssm': res['mamba_ssm'] = ('chunked','mamba_ssm',False)
    return res

def of_mixer(a, T):
    "name -> function of what `draw` makes"
    def make(form, backend, compiled):
        f = torch.compile(quasiseparable, dynamic=False) if compiled else quasiseparable
        return lambda *args: f(*args, form, a.chunk, backend)
    return {k:make(*v) for k,v in ways(a, T).items()}

def of_block(a, T):
    "name -> a Hydra; all of them hold the same numbers"
    res = {}
    for k,(form,backend,compiled) in ways(a, T).items():
        torch.manual_seed(0); m = Hydra(a.K*a.P//2, a.N, headdim=a.P, form=form, chunk=a.chunk, backend=backend).to(a.device)
        res[k] = torch.compile(m, dynamic=False) if compiled else m
    return res

def gaps(fs, args):
    "Largest difference from the first of `fs`, absolute and in units of its largest number"
    with torch.no_grad(): ys = [f(*args) for f in fs.values()]
    d = max((y-ys[0]).abs().max().item() for y in ys[1:])
    return d,d/ys[0].abs().max().item()

def row(a, T, level):
    "All the figures of one length"
    torch.compiler.reset() # else the eighth shape would run uncompiled, without a word
    fs = of_mixer(a, T) if level=='mixer' else of_block(a, T)
    args = draw(a.B, T, a.K, a.P, a.N, a.device) if level=='mixer' else [torch.randn(a.B, T, a.K*a.P//2, device=a.device, requires_grad=True)]
    wrt = {k:args+(list(f.parameters()) if level=='block' else []) for k,f in fs.items()}
    @torch.no_grad()
    def fwd(f): f(*args)
    calls = {f'{k}_fwd_ms':lambda f=f: fwd(f) for k,f in fs.items()}
    calls |= {f'{k}_fwd_bwd_ms':lambda k=k,f=f: torch.autograd.grad(f(*args).sum(), wrt[k]) for k,f in fs.items()}
    ms,least = medians(calls, a.rounds, a.device); res = dict(level=level, T=T)|ms
    if 'loop' not in fs: res['loop'] = f'left out above {a.loop_max} frames: its walk keeps every state for the gradient'
    for p in ('fwd','fwd_bwd'):
        for other in ('loop','chunked') if 'loop' in fs else ('chunked',):
            for end,m in (('',ms),('_least',least)): res[f'dense_over_{other}_{p}{end}'] = round(m[f'{other}_{p}_ms']/m[f'dense_{p}_ms'], 2)
    if level=='mixer':
        res['fp32_relative_error'] = gaps(fs, args)[1]
        ours = {k:f for k,f in fs.items() if k in ('dense','chunked','loop')}
        res['fp64_max_difference'] = gaps(ours, draw(a.B, T, a.K, a.P, a.N, a.device, torch.float64))[0]
    return res

def crossover(rows, level, part):
    "The shortest length from which on chunked is quicker than dense (by the least times: what else runs can only add), or None"
    slow = [r['T'] for r in rows if r['level']==level and r[f'dense_over_chunked_{part}_least']>=1]
    later = [r['T'] for r in rows if r['level']==level and r['T']>max(slow, default=0)]
    return min(later, default=None)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for k,v,h in (('B',4,'clips'),('K',8,'heads'),('P',64,'channels of a head'),('N',64,'memories'),('chunk',64,'frames in a piece')): p.add_argument(f'--{k}', type=int, default=v, help=h)
    p.add_argument('--rounds', type=int, default=7); p.add_argument('--threads', type=int, default=2); p.add_argument('--device', default='cpu')
    p.add_argument('--backend', choices=('torch','mamba_ssm'), default='torch', help="'mamba_ssm' adds its Triton kernel to every row (CUDA)")
    p.add_argument('--loop_max', type=int, default=128, help='longest clip of the loop'); p.add_argument('--lengths', type=int, nargs='+', default=LENGTHS)
    a = p.parse_args(); torch.set_num_threads(a.threads)
    rows = []
    for T in a.lengths:
        for level in ('mixer','block'): rows.append(row(a, T, level)); print(rows[-1], flush=True)
    at = {(r['level'],r['T']):r for r in rows}
    head = {f'dense_over_loop_T{T}_{part}{end}':at[level,T][f'dense_over_loop_{part}'] for level,end in (('mixer',''),('block','_block')) for T in (16,32)
            for part in ('fwd','fwd_bwd','fwd_bwd_least') if f'dense_over_loop_{part}' in at.get((level,T),{})}
    head |= {f'crossover_T_{level}_{part}':crossover(rows, level, part) for level in ('mixer','block') for part in ('fwd','fwd_bwd')}
    head |= dict(fp64_max_difference=max(r['fp64_max_difference'] for r in rows if r['level']=='mixer'), fp32_relative_error=max(r['fp32_relative_error'] for r in rows if r['level']=='mixer'))
    print(json.dumps(dict(benchmark='mixers', B=a.B, heads=a.K, headdim=a.P, state=a.N, chunk=a.chunk, rounds=a.rounds, threads=a.threads, device=a.device, backend=a.backend,
                          gpu=torch.cuda.get_device_name() if a.device=='cuda' else None, torch=torch.__version__, **head, rows=rows)))

if __name__=='__main__': main()
