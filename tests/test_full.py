"preset=full: one optimiser step of each phase on convnextv2_base at T 32, from a weights file that this test writes, each in a process of its own"
import json,os,subprocess,sys

STEP = '''
import json,resource,sys,time,torch,timm
from dataclasses import asdict
from safetensors.torch import save_file
import torch.nn.functional as F
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
from deepfake_nb.transfer import grow
path,phase,T = sys.argv[1],sys.argv[2],32
torch.set_num_threads(2); torch.manual_seed(0)
with torch.device('meta'): names = {k:v.shape for k,v in timm.create_model('convnextv2_base').state_dict().items()}
g = torch.Generator().manual_seed(0)
def number(k, s): # kernels keep the scale of what they read, norms are ones, the rest zeros
    if len(s)>1: return torch.randn(s, generator=g)*s[1:].numel()**-.5
    return torch.ones(s) if k.endswith('weight') and '.grn.' not in k else torch.zeros(s)
save_file({k:number(k, s) for k,s in names.items()}, path)
cfg = STFConfig.phase_a('full')
net = build_stf_mamba(cfg, path)
came = None
if phase=='b':
    cfg = STFConfig.phase_b('full'); net,came = grow(net, cfg)
net.train()
opt = torch.optim.AdamW(net.param_groups(3e-4, .01, .05))
x = torch.randn(1, T, 3, 224, 224, generator=g)
before = {k:p.detach().clone() for k,p in net.named_parameters() if k.startswith(('head','narrow')) or k.endswith('stages.2.blocks.0.conv_dw.weight') or k.endswith('stem.0.weight')}
t = time.time()
out = net(x)
loss = F.cross_entropy(out['logits'], torch.tensor([1]))+.1*out['hll'].sum()
loss.backward(); back = time.time()-t
silent = [k for k,p in net.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().sum()==0)]
leaked = [k for k,p in net.named_parameters() if not p.requires_grad and p.grad is not None]
finite = all(torch.isfinite(p.grad).all().item() for p in net.parameters() if p.grad is not None)
opt.step()
moved = {k:not torch.equal(p, before[k]) for k,p in net.named_parameters() if k in before}
need = net.memory(1, T); named = {k:round(v/1e9, 2) for k,v in need.items()}
print(json.dumps(dict(config=asdict(cfg), estimate_GB=named, moved_parts=None if came is None else came.table().to_dict(), loss=loss.item(), hll=out['hll'].item(), energy=list(out['energy'].shape), map=net.backbone.map, channels=net.backbone.channels, licence=net.backbone.licence,
    silent=silent, leaked=leaked, finite=finite, moved=moved, seconds=round(back, 1), step_seconds=round(time.time()-t, 1), peak_GB=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, 2))))
'''

def step(tmp_path, phase):
    "Numbers of one step of a phase"
    r = subprocess.run([sys.executable, '-c', STEP, str(tmp_path/'convnextv2_base.safetensors'), phase], capture_output=True, text=True, timeout=900, env={**os.environ, 'HF_HUB_OFFLINE':'1'})
    assert r.returncode==0, r.stderr[-3000:]
    d = json.loads(r.stdout.strip().splitlines()[-1])
    print(phase, {k:d[k] for k in ('loss','hll','seconds','step_seconds','peak_GB','estimate_GB')})
    assert (d['map'], d['channels'], d['licence'])==('stages.3', 1024, 'cc-by-nc-4.0')
    assert d['finite'] and d['leaked']==[] and d['peak_GB'] < 6
    assert {k.split('.')[-2] if 'stem' in k else k:v for k,v in d['moved'].items()}=={'0':False, **{k:True for k in d['moved'] if 'stem' not in k}}
    return d

def test_full_phase_a_step(tmp_path):
    d = step(tmp_path, 'a'); c = d['config']
    assert (c['backbone'], c['stride'], c['pad'], c['width'], c['stages'], c['frozen'], c['checkpointing'])==('convnextv2_base', 32, 'zero', 256, 4, 2, True)
    assert d['silent']==[]

def test_full_phase_b_step(tmp_path):
    d = step(tmp_path, 'b'); c = d['config']
    assert (c['mixer'], c['blocks'], c['heads'], c['ffn'], c['wss'], c['wavelet'])==('hydra', 3, 8, 'none', 'two_stream', 'db2')
    assert all(v==0 for k in ('mismatched','missing') for p,v in d['moved_parts'][k].items() if p not in ('stages','wss')) and d['moved_parts']['loaded']['backbone']>100
    # new branches start silent: at the first step only their last layers hear anything
    assert d['silent'] and all(k.startswith(('stages.','wss.')) for k in d['silent'])
    assert not [k for k in d['silent'] if k.endswith(('out_proj.weight','recall.branch.out.weight'))  and not k.startswith('wss.')]
