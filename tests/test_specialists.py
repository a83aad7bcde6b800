"All 24 pairs of a specialist and a stage, each from the weights of the stage before; what is refused; a walk over chunks that is stopped and goes on; EfficientNet-B4"
import ast,signal
from dataclasses import replace
import nbformat,pytest,safetensors.torch,timm,torch
from common import play
from deepfake_nb.batches import gather
from deepfake_nb.checkpoints import load_model,save_checkpoint,save_weights
from deepfake_nb.clips import FaceStore
from deepfake_nb.datasets import read_dataset
from deepfake_nb.miniatures import miniature
from deepfake_nb.optimizers import AdamW8bit
from deepfake_nb.pack import read_json
from deepfake_nb.executors import notebook
from deepfake_nb.runs import declared,run_stage
from deepfake_nb.specialists import stages
from deepfake_nb.specialists.base import CHANNELS,EvidenceError,SpecialistConfig
from deepfake_nb.specialists.stages import StageError,specialist_settings,stage_of,start_model
from deepfake_nb.specialists.team import MODULES,ORDER,build_specialist
from deepfake_nb.stores import build_store
from deepfake_nb.training import TrainingError

SETS = {1:('faceforensics',{}), 2:('celebdf_v2',{}), 3:('wilddeepfake',{}), 'sound':('fakeavceleb',dict(frames=80))}

@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "A store of each miniature, with native pixels; two chunks; nothing in them that the real sets have not"
    d = tmp_path_factory.mktemp('specialists')
    for k,(layout,kw) in SETS.items():
        m = read_dataset(miniature(layout, d/layout, **kw))
        m = m.where(label=[0]) if k=='sound' else m.where(compression=['c23']) if k==1 else m
        build_store(m, d/f'store_{k}', native=True); m.save(d/f'store_{k}'/'manifest.jsonl')
    miniature('dfdc', d, frames=64)
    return d

def imported(source):
    "Names that a cell's imports bind"
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, (ast.Import,ast.ImportFrom)): yield from (a.asname or a.name for a in n.names)

def run(room, code, stage, **kw):
    "The cells of the stage notebook, one after the other, in this process"
    given = dict(preset='tiny', specialist=code, stage=stage, checkpoints=str(room/'models'/code))
    given |= dict(store=str(room/f'store_{stage}')) if stage<4 else dict(chunks=str(room/'DFDC'), store=str(room/f'chunks_{code}'), spans=1)
    if code=='AV' and stage<4: given['sound_store'] = str(room/'store_sound')
    if stage==3: given['evidence'] = 'degraded'
    return play('specialist_stage', given|kw)

@pytest.mark.parametrize('path', sorted(notebook('specialist_stage').parent.glob('*.ipynb')), ids=lambda p: p.stem)
def test_no_import_takes_the_place_of_a_parameter(path):
    bound = {n for c in nbformat.read(path, 4).cells if c.cell_type=='code' for n in imported(c.source)}
    assert '*' not in bound and not bound&set(declared(path))

@pytest.mark.parametrize('code', ORDER)
def test_four_stages_each_from_the_one_before(room, code, capsys):
    seen = []
    for stage in (1,2,3,4):
        w = run(room, code, stage)['words']; card = read_json(room/'models'/code/f'stage_{stage}'/f'stage_{stage}.json')
        seen.append(w)
        assert card['config']['code']==code and card['extra']['stage']==stage and [t['stage'] for t in card['extra']['trained_on']]==list(range(1, stage+1))
        assert w['steps']>0 and w['reason']=='steps' and 0<=w['auc']<=1 and w['videos']>=2
        native = MODULES[code].needs.pixels=='native'
        assert w['evidence']==('crop' if not native else 'degraded' if stage==3 else 'native')
        assert w['made_here']==('shifted sound' if code=='AV' and stage<4 else '')
    model = load_model(room/'models'/code/'stage_4', 'stage_4')
    assert not torch.equal(model.module.spread, torch.ones_like(model.module.spread)) # it took its scale from the first data
    assert model.cfg.code==code and model.cfg.dropouts==(.4,.3,.2) and seen[3]['chunks']=='00, 01'

def test_the_record_of_a_run(room, tmp_path):
    "Through papermill, as on a pod"
    rec = run_stage(notebook('specialist_stage'), dict(preset='tiny', specialist='LL', store=str(room/'store_1'), checkpoints=str(tmp_path/'LL')), runs=tmp_path/'runs')
    assert rec.state=='succeeded', rec['reason']
    m = rec.metrics['specialist_stage']
    assert m['specialist']=='LL' and m['stage']==1 and m['evidence']=='crop' and 'alarm' in m

@pytest.mark.parametrize('how,words', [('missing','no such checkpoint'), ('foreign','belongs to RR'), ('stage','made by stage 1'), ('shape','width was 64'), ('kind','not a specialist'), ('damaged','sha256')])
def test_a_wrong_checkpoint_is_named(tmp_path, how, words):
    tiny = specialist_settings('tiny'); code = 'RR' if how=='foreign' else 'CM'
    m,_ = start_model(code, stage_of(1), tiny)
    if how=='kind': save_weights(tmp_path, 'stage_1', torch.nn.Linear(2, 2), config={}, extra=dict(stage=1))
    elif how!='missing': save_weights(tmp_path, 'stage_2' if how=='stage' else 'stage_1', m, extra=dict(stage=1, trained_on=[]))
    if how=='damaged': f = next(tmp_path.glob('*.safetensors')); b = bytearray(f.read_bytes()); b[-1] ^= 1; f.write_bytes(b)
    if how=='shape': tiny = replace(tiny, width=128)
    with pytest.raises(StageError, match=words) as e: start_model('CM', stage_of(3 if how=='stage' else 2), tiny, before=tmp_path)
    assert str(tmp_path) in str(e.value)

def test_what_destroys_the_evidence_is_refused(room):
    for code in ('BG','CM','RR'):
        with pytest.raises(StageError, match='cut out'): run(room, code, 3, evidence='native', checkpoints=str(room/'none'), from_checkpoint=str(one_of(room, code, 2)))
    with pytest.raises(StageError, match='sound_store'): run(room, 'AV', 1, sound_store='', checkpoints=str(room/'none'))
    with pytest.raises(StageError, match='trained on Celeb-DF'): run(room, 'LL', 2, store=str(room/'store_1'), checkpoints=str(room/'none'), from_checkpoint=str(one_of(room, 'LL', 1)))

def one_of(room, code, stage):
    "Weights as that stage would have left them"; torch.manual_seed(0)
    m,_ = start_model(code, stage_of(1), specialist_settings('tiny'))
    return save_weights(room/'before'/code, f'stage_{stage}', m, extra=dict(stage=stage, trained_on=[]))

def test_a_resized_batch_is_refused_by_the_model(room):
    store = FaceStore(room/'store_1'); clip = store.read(store.tracks[0].key, 0, 1)
    for code in ('CM','RR','BG'):
        model = build_specialist(SpecialistConfig(code, 'test_efficientnet', width=64), 'random').eval()
        with pytest.raises(EvidenceError, match='where the face is' if code=='BG' else 'own pixels'): model(gather([(0, clip)]))
        with pytest.raises(EvidenceError, match='own pixels'): model(gather([(0, clip)], ('mask',)))
    native = gather([(0, store.read(store.tracks[0].key, 0, 1, native=True))], ('native',)); native.offset[0] += 3
    with pytest.raises(EvidenceError, match='grid'): build_specialist(SpecialistConfig('CM', 'test_efficientnet', width=64), 'random')(native)

@pytest.mark.parametrize('at', [1,2,3])
def test_chunks_stopped_at_a_batch_and_resumed_end_the_same(room, tmp_path, monkeypatch, at):
    def go(name, stop=None):
        seen,old = [],stages.augment
        def counted(*a, **kw):
            seen.append(1)
            if len(seen)==stop: signal.raise_signal(signal.SIGTERM)
            return old(*a, **kw)
        monkeypatch.setattr(stages, 'augment', counted)
        try: return run(room, 'LL', 4, checkpoints=str(tmp_path/name), from_checkpoint=str(one_of(room, 'LL', 3)), store=str(room/'chunks_LL'))['words']
        finally: monkeypatch.setattr(stages, 'augment', old)
    whole = go('whole')
    with pytest.raises(TrainingError, match='SIGTERM'): go('stopped', at)
    again = go('stopped')
    assert again['model_sha256']==whole['model_sha256'] and again['chunks']==whole['chunks']=='00, 01'

def test_money_that_ends_in_a_chunk_leaves_it_undone(room, tmp_path):
    "The chunk is not marked as done, its checkpoint stays, and with more money it goes on"
    kw = dict(checkpoints=str(tmp_path), from_checkpoint=str(one_of(room, 'LL', 3)), store=str(room/'chunks_LL'))
    w = run(room, 'LL', 4, budget=1e-9, **kw)['words']
    assert w['reason']=='budget' and w['chunks']=='' and (tmp_path/'stage_4'/'00').is_dir() and not list((tmp_path/'stage_4'/'marks').glob('*/done.json'))
    assert run(room, 'LL', 4, **kw)['words']['chunks']=='00, 01'

@pytest.mark.parametrize('kw', [dict(curriculum='loss', epochs=2), dict(correction='weights'), dict(correction='logits'), dict(correction='none', clahe=True)], ids=str)
def test_options_of_a_stage(room, tmp_path, kw):
    s = run(room, 'LL', 2, checkpoints=str(tmp_path), from_checkpoint=str(one_of(room, 'LL', 1)), **kw)
    assert s['words']['reason']=='steps' and (s['w'].source.counts==(1,1))==('correction' not in kw)
    assert (tmp_path/'stage_2'/'difficulty.json').exists()==('curriculum' in kw)
    if 'curriculum' in kw: assert run(room, 'LL', 2, checkpoints=str(tmp_path), from_checkpoint=str(one_of(room, 'LL', 1)), **kw)['words']['resumed']==s['words']['steps']

def test_other_data_do_not_meet_the_checkpoints_of_these(room, tmp_path):
    run(room, 'LL', 1, checkpoints=str(tmp_path))
    with pytest.raises(StageError, match='another training is kept here'): run(room, 'LL', 1, checkpoints=str(tmp_path), any_data=True, store=str(room/'store_2'))

def test_folds_hold_every_group_out_once(room, tmp_path):
    s = run(room, 'LL', 1, folds=3, checkpoints=str(tmp_path))
    held = [g for r in s['rounds'] for g in r['held_out'].split(', ')]
    assert sorted(held)==sorted(s['w'].groups) and s['words']['folds']==3 and 0<=s['words']['auc_mean']<=1

def test_a_model_that_says_fake_to_all_raises_an_alarm(room, tmp_path):
    d = one_of(room, 'LL', 1); m = load_model(d.parent, 'stage_1')
    with torch.no_grad(): m.classify[-1].weight.zero_(); m.classify[-1].bias.copy_(torch.tensor([-9.,9.]))
    card = save_weights(tmp_path/'b', 'stage_1', m, extra=dict(stage=1, trained_on=[]))
    s = run(room, 'LL', 2, fakes='self', pairs=10, most=1, checkpoints=str(tmp_path/'c'), from_checkpoint=str(card), store=str(room/'store_1'))
    assert 'says fake to 100 % of 20 reals' in s['words']['alarm'] and s['words']['alarms']>0 and s['words']['real']==0

# EfficientNet-B4, one optimiser step of each, from a weights file
@pytest.fixture(scope='module')
def b4(tmp_path_factory):
    torch.manual_seed(0); p = tmp_path_factory.mktemp('b4')/'b4.safetensors'
    safetensors.torch.save_file(timm.create_model('efficientnet_b4').state_dict(), p)
    return p

@pytest.mark.parametrize('code', ORDER)
def test_one_step_on_efficientnet_b4(room, b4, tmp_path, code):
    needs,store = MODULES[code].needs,FaceStore(room/('store_sound' if code=='AV' else 'store_1'))
    tracks = [t for t in store.tracks if t.frames>=needs.frames][:2]
    batch = gather([(i, store.read(t.key, 0, needs.frames, 'native' in needs.extras)) for i,t in enumerate(tracks)], needs.extras); batch.label = torch.tensor([0,1])
    model = build_specialist(SpecialistConfig(code, null=0.), b4).train()
    out = model(batch); torch.nn.functional.cross_entropy(out.logits, batch.label).backward()
    assert model.backbone.channels==1792 and out.features.shape==(2, 49*CHANNELS[code])
    q,k,_ = model.attend.in_proj_weight.grad.abs().sum(1).view(3, -1).sum(1).tolist()
    assert q>0 and k>0
    before = model.classify[1].weight.clone(); opt = AdamW8bit(model.parameters(), lr=1e-4); opt.step()
    assert not torch.equal(before, model.classify[1].weight)
    save_checkpoint(tmp_path, 1, model, dict(optimizer=opt.state_dict()))
    size = sum(f.stat().st_size for f in tmp_path.iterdir())/1e6
    print(f'{code}: {sum(p.numel() for p in model.parameters())/1e6:.2f} M parameters, {size:.1f} MB a checkpoint')
    assert size<=160
