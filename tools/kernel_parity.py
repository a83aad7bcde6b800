"The real Triton kernels of mamba-ssm beside ours, on a CPU by Triton's interpreter or, with --cuda, compiled: `python tools/kernel_parity.py MAMBA_SDIST_DIR [--cuda]`"
import contextlib,json,math,os,re,sys,types,warnings
from pathlib import Path
CUDA = '--cuda' in sys.argv
if not CUDA: os.environ['TRITON_INTERPRET'] = '1' # before Triton is imported
import torch

ROOT = Path(__file__).resolve().parent.parent
KERNEL = 'mamba_ssm/ops/triton/ssd_combined.py'
TOL = 1e-2 if CUDA else 1e-5 # float32, in units of the largest number; on a card the kernels multiply in TF32
CASES = { # name: (B, L, K, P, N, G, chunk, deterministic sums instead of atomic ones)
    'shorter than a chunk':  (2, 12, 2, 16, 16, 1, 16, False),
    'whole chunks, groups':  (2, 32, 2, 16, 16, 2, 16, False),
    'a rest, deterministic': (2, 40, 2, 32, 16, 2, 16, True),
    'odd widths':            (1, 80, 4, 24, 20, 2, 32, False),
    'sizes of the house':    (1, 70, 2, 64, 64, 1, 64, False)}

def flat(v): return v.flatten(-2)
REARRANGE = { # what the imported files ask of einops, which is no dependency of this book; all else is refused
    '... p n -> ... (p n)': flat, 'b l h p -> b l (h p)': flat, '... l s -> ... s l': lambda v: v.mT, 'd 1 w -> d w': lambda v: v.squeeze(1), 'h 1 -> h': lambda v: v.squeeze(1),
    '... (p n) -> ... p n': lambda v,n: v.unflatten(-1, (-1,n)), 'b l (h p) -> b l h p': lambda v,p: v.unflatten(-1, (-1,p)), 'b l (g n) -> b l g n': lambda v,g: v.unflatten(-1, (g,-1))}
def rearrange(v, pattern, **sizes): return REARRANGE[pattern](v, **sizes)
def refuse(*args, **kw): raise NotImplementedError('not needed for parity, and not provided')

def stand_in(name, **attrs):
    "Put a module that holds only `attrs` in place of `name`"
    sys.modules[name] = types.ModuleType(name); vars(sys.modules[name]).update(attrs)

def load(folder):
    "Import from the source tree at `folder`; `mamba_ssm/__init__` is not run, it wants the compiled extension"
    if not (folder/KERNEL).is_file(): sys.exit(f'{folder} is not a mamba-ssm source tree: {KERNEL} is not in it. Unpack the sdist: pip download --no-deps --no-binary :all: --no-build-isolation mamba-ssm==2.3.2.post1')
    stand_in('mamba_ssm', __path__=[str(folder/'mamba_ssm')]); stand_in('einops', rearrange=rearrange, repeat=refuse)
    if not CUDA: on_cpu()
    from mamba_ssm.utils import determinism
    determinism.autotune_configs = lambda configs: [min(configs, key=lambda c: math.prod(c.kwargs.values()))] # smallest blocks: many a chunk, and nothing to time
    from mamba_ssm.ops.triton import ssd_combined,layernorm_gated
    from mamba_ssm.modules.mamba2 import Mamba2
    return ssd_combined.mamba_chunk_scan_combined,layernorm_gated.RMSNorm,Mamba2,determinism.set_deterministic_mode

def on_cpu():
    "What the interpreter needs in the place of a card"
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=4)

def cells():
    "The cells of the chapters that only a card can run: chapter -> how many passed"
    res = {}
    for chapter,module in (('11_scan','scan'),('12_hydra','hydra')):
        space = {}; exec(f'import torch\nfrom deepfake_nb.scan import *\nfrom deepfake_nb.{module} import *', space)
        mine = [''.join(c['source']) for c in json.loads((ROOT/f'nbs/{chapter}.ipynb').read_text())['cells'] if ''.join(c['source']).startswith('#| cuda')]
        for c in mine: exec(c, space)
        res[chapter] = len(mine)
    return res

def recurrence(x, dt, A, B, C):
    "h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t: the definition, frame by frame; A is given frame by frame too, (B,L,K)"
    each = x.shape[2]//B.shape[2]; h,ys = 0.,[]
    for t in range(x.shape[1]):
        b,c = (v[:,t].repeat_interleave(each, 1) for v in (B,C))
        h = torch.exp(dt[:,t]*A[:,t])[...,None,None]*h + torch.einsum('bk,bkp,bkn->bkpn', dt[:,t], x[:,t], b)
        ys.append(torch.einsum('bkpn,bkn->bkp', h, c))
    return torch.stack(ys, 1)

def inputs(n, L, K, P, N, G):
    "x, dt, A, B, C as a block makes them: slices of one projection, so not contiguous"
    x,B,C,dt = torch.randn(n, L, K*P+2*G*N+K).requires_grad_().split([K*P, G*N, G*N, K], -1)
    return x.unflatten(-1, (K,P)),torch.nn.functional.softplus(dt-2),-torch.empty(K).uniform_(1, 8).requires_grad_(),B.unflatten(-1, (G,N)),C.unflatten(-1, (G,N))

def outcome(f, args, seed, wrt=None):
    "What `f` gives, then the gradients of its product with `seed`"
    y = f(*args); return [y,*torch.autograd.grad((y*seed.to(y.dtype)).sum(), wrt or args)]

def apart(theirs, ours, units=None):
    "Largest difference, one for each tensor, in `units` or in units of our largest number"
    return [((a-b).abs().max()/u).item() for a,b,u in zip(theirs, ours, units or [v.abs().max() for v in ours], strict=True)]

def worst(values): return torch.tensor(values, dtype=torch.float64).max().item() # nan stays nan

def definition(args, seed):
    "The recurrence in float64: outcome, and the size of each; dA is a sum over frames that nearly cancels, its size is that of its terms"
    x,dt,A,B,C = [v.detach().double() for v in args]
    res = outcome(recurrence, [v.requires_grad_() for v in (x, dt, A.expand_as(dt).clone(), B, C)], seed)
    units = [v.abs().sum((0,1)).max() if i==3 else v.abs().max() for i,v in enumerate(res)]
    res[3] = res[3].sum((0,1)); return res,units

def check_scan(kernel, scan, *case, chunk):
    "The kernel against the recurrence in float64, then against each form of ours and through our door"
    args = inputs(*case); seed = torch.randn(args[0].shape); exact,units = definition(args, seed)
    theirs = outcome(lambda *a: kernel(*a, chunk), args, seed)
    forms = dict(ssd_loop=scan.ssd_loop, ssd_dense=scan.ssd_dense, ssd_chunked=lambda *a: scan.ssd_chunked(*a, chunk), door=lambda *a: scan.ssd(*a, chunk=chunk, backend='mamba_ssm'))
    return dict(zip(('y','dx','ddt','dA','dB','dC'), apart(theirs, exact, units)), **{n:worst(apart(theirs, outcome(f, args, seed), units)) for n,f in forms.items()})

def check_norm(norm, scan, before):
    "Gated norm, gate last (Hydra) or first (Mamba-2)"
    y,z,seed = torch.randn(3, 2, 20, 48).unbind(); y.requires_grad_(); z.requires_grad_()
    mods = norm(48, norm_before_gate=before),scan.RMSNormGated(48, norm_before_gate=before)
    return worst(apart(*(outcome(m, (y,z), seed, [y,z,m.weight]) for m in mods)))

def check_block(block, scan, G):
    "The whole Mamba-2 block: their class with our state dict, output and the gradient of every parameter"
    ours = scan.Mamba2(32, d_state=16, headdim=16, ngroups=G); theirs = block(32, d_state=16, headdim=16, ngroups=G, chunk_size=16, use_mem_eff_path=False)
    theirs.load_state_dict(ours.state_dict()); u,seed = torch.randn(2, 2, 20, 32).unbind(); names = [n for n,_ in ours.named_parameters()]
    return worst(apart(*(outcome(m, (u,), seed, [m.get_parameter(n) for n in names]) for m in (theirs,ours))))

def main(folder):
    kernel,norm,block,deterministic = load(Path(folder))
    import triton; from deepfake_nb import scan
    torch.manual_seed(0); torch.set_num_threads(1); res = {}
    def note(name, **row): res[name] = row; print(f'{name:30}', *(f'{k} {v:.1e}' for k,v in row.items()), flush=True)
    for name,(*case,chunk,det) in CASES.items(): deterministic(det); note(name, **check_scan(kernel, scan, *case, chunk=chunk))
    deterministic(False)
    for before in (True,False): note(f'norm, norm_before_gate={before}', all=check_norm(norm, scan, before))
    for G in (1,2): note(f'Mamba2, ngroups={G}', all=check_block(block, scan, G))
    where = 'cuda' if CUDA else 'cpu'
    with torch.device('cpu'): note(f"check_kernel('{where}')", all=scan.check_kernel(where, math.inf))
    bad = [name for name,row in res.items() if not all(v<=TOL for v in row.values())] # nan is bad too
    version = re.search(r"__version__ = ['\"](.+)['\"]", (Path(folder)/'mamba_ssm/__init__.py').read_text())[1]
    with torch.device('cpu'): ran = cells() if CUDA else 'none: no card'
    print(json.dumps(dict(mamba_ssm=version, cells=ran, triton=triton.__version__, torch=torch.__version__, tol=TOL, bad=bad, **res)))
    return 1 if bad else 0

if __name__=='__main__':
    if len(sys.argv)!=2+CUDA: sys.exit(__doc__)
    if CUDA: torch.set_default_device('cuda')
    sys.path.insert(0, str(ROOT)); warnings.filterwarnings('ignore', message='Deterministic mode')
    sys.exit(main(sys.argv[1]))
