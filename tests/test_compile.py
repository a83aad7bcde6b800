"torch.compile of what reads time, forward and backward, where there is a C++ compiler"
import os,shutil,time
import pytest,torch,torch.nn.functional as F
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba

@pytest.mark.skipif('SOAK' not in os.environ or shutil.which('g++') is None, reason='minutes of a C++ compiler: make soak')
@pytest.mark.parametrize('phase', ['a','b'])
def test_compiled_mix_is_equal_forward_and_backward(phase):
    torch.manual_seed(0)
    m = build_stf_mamba(getattr(STFConfig, f'phase_{phase}')('tiny', form='dense', dropout=0.), 'random').train()
    x,label = torch.randint(0, 255, (2,8,3,64,64), dtype=torch.uint8),torch.tensor([0,1])
    def step():
        m.zero_grad(); out = m(x); F.cross_entropy(out['logits'], label).backward()
        return out['logits'].detach(),{k:p.grad.clone() for k,p in m.named_parameters() if p.grad is not None}
    y,g = step(); torch._dynamo.reset(); keys = list(m.state_dict())
    m.mix = torch.compile(m.mix, fullgraph=True, dynamic=False)
    t = time.time(); z,h = step(); print(phase, f'first step {time.time()-t:.0f} s')
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    assert g.keys()==h.keys() and list(m.state_dict())==keys
    for k in g: torch.testing.assert_close(h[k], g[k], rtol=1e-3, atol=1e-4*max(1., g[k].abs().max().item()), msg=lambda s,k=k: f'{k}: {s}')
