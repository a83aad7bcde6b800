"The selective scan: loop and dense form, forward and backward; the last line is one JSON object"
import argparse,json,statistics,time
import torch
import torch.nn.functional as F
from deepfake_nb.scan import LIMIT,BiMamba,selective_scan_dense,selective_scan_loop

def draw(B, L, D, N, device):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g).to(device)
    return [x.requires_grad_() for x in (r(B,L,D), F.softplus(r(B,L,D)-4), -torch.arange(1., N+1, device=device).repeat(D, 1), r(B,L,N), r(B,L,N), r(D))]

def ms(f, device, n=5):
    "Median milliseconds of `n` calls, after one for warming up"
    f(); times = []
    for _ in range(n):
        if device=='cuda': torch.cuda.synchronize()
        t = time.perf_counter(); f()
        if device=='cuda': torch.cuda.synchronize()
        times.append((time.perf_counter()-t)*1000)
    return round(statistics.median(times), 3)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--B', type=int, default=2); p.add_argument('--D', type=int, default=256); p.add_argument('--N', type=int, default=16)
    p.add_argument('--threads', type=int, default=2); p.add_argument('--device', default='cpu')
    a = p.parse_args(); torch.set_num_threads(a.threads)
    rows = []
    for L in (4,8,16,32,64):
        args = draw(a.B, L, a.D, a.N, a.device); row = dict(L=L)
        for name,f in (('loop',selective_scan_loop),('dense',selective_scan_dense)):
            row[f'{name}_fwd_ms'] = ms(lambda: f(*(x.detach() for x in args)), a.device)
            row[f'{name}_fwd_bwd_ms'] = ms(lambda: torch.autograd.grad(f(*args).sum(), args), a.device)
        row['max_difference'] = (selective_scan_loop(*args)-selective_scan_dense(*args)).abs().max().item()
        row['dense_speedup_fwd_bwd'] = round(row['loop_fwd_bwd_ms']/row['dense_fwd_bwd_ms'], 2)
        rows.append(row); print(row)
    blocks = {}
    for form in ('loop','dense'):
        torch.manual_seed(0); net = BiMamba(128, form=form).to(a.device); x = torch.randn(a.B, 16, 128, device=a.device)
        blocks[f'bimamba128_T16_{form}_fwd_bwd_ms'] = ms(lambda: net(x).sum().backward(), a.device)
    print(json.dumps(dict(benchmark='scan', B=a.B, D=a.D, N=a.N, threads=a.threads, device=a.device, limit=LIMIT, torch=torch.__version__, rows=rows, **blocks)))

if __name__=='__main__': main()
