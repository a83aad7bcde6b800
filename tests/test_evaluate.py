"The evaluate stage on labelled sets: the file it leaves, computed again from its own scores; what is refused; a specialist; a baseline"
import numpy as np,pandas as pd,pytest,torch
from dataclasses import replace
from common import play
from sklearn.metrics import average_precision_score,roc_auc_score
from deepfake_nb.checkpoints import save_weights
from deepfake_nb.compare import load_result
from deepfake_nb.datasets import read_dataset
from deepfake_nb.leakage import LeakError
from deepfake_nb.manifest import Manifest
from deepfake_nb.metrics import video_of
from deepfake_nb.miniatures import miniature
from deepfake_nb.pack import home,read_json,sample
from deepfake_nb.protocol import ProtocolError
from deepfake_nb.specialists.base import SpecialistConfig
from deepfake_nb.specialists.team import build_specialist
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
from deepfake_nb.stores import build_store

@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "A home with the pack; stores of two miniatures; models that never learned, with cards that say what a training would"
    d = tmp_path_factory.mktemp('evaluate'); sample('woman'); (d/'home').mkdir(); (d/'home'/'pack').symlink_to(home()/'pack', target_is_directory=True)
    for layout,name in (('faceforensics','ff'),('celebdf_v2','cdf')):
        m = read_dataset(miniature(layout, d/'data', frames=18, **dict(methods=('Deepfakes','FaceSwap'), dfd=False) if name=='ff' else {})); build_store(m, d/name, size=96 if name=='ff' else 224, native=True); m.save(d/name/'manifest.jsonl')
    one = build_store(read_dataset(d/'data'/'Celeb-DF-v2'), d/'cdf96', size=96, native=True); read_dataset(d/'data'/'Celeb-DF-v2').save(d/'cdf96'/'manifest.jsonl')
    (d/'val').mkdir(); [(d/'val'/p.name).symlink_to(p) for p in (d/'ff').iterdir() if p.suffix=='.zip' or p.name=='store.json']; read_dataset(d/'data'/'FaceForensics++').where(split='val').save(d/'val'/'manifest.jsonl')
    people = read_dataset(d/'data'/'FaceForensics++').where(split='train').groups
    history = [dict(dataset='FaceForensics++', compression='c23', split='train', videos=6, groups=len(people), people=people, made_here='self-blends')]
    for i,name in enumerate(('one','two')):
        torch.manual_seed(i); save_weights(d/'models', name, build_stf_mamba(STFConfig.phase_a('tiny'), 'pack'), extra=dict(length=4, selection='the last of a fixed schedule', trained_on=history))
    torch.manual_seed(0); save_weights(d/'models', 'RR', build_specialist(SpecialistConfig('RR', 'test_efficientnet', width=64), 'random'), extra=dict(selection='best on validation', stage=1, trained_on=[dict(stage=1, sets=['FaceForensics++'], people=people)]))
    return d

@pytest.fixture(autouse=True)
def at_home(room, monkeypatch): monkeypatch.setenv('DEEPFAKE_NB_HOME', str(room/'home'))

@pytest.fixture(scope='module')
def judged(room):
    "Two weights, chosen between and fixed on the validation part of FaceForensics++, judged on its test part and on Celeb-DF"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('DEEPFAKE_NB_HOME', str(room/'home'))
        return play('evaluate', given(room, 'one,two', source=str(room/'ff'), targets=f"{room/'ff'},{room/'cdf96'}", trained=str(room/'ff'), damages='gamma', shaken=4, gpu='RTX 4090'))

def given(room, names, **kw): return dict(preset='tiny', model=f"{room/'models'}#{names}", store=str(room/'ff'), results=str(room/'out'))|kw

def test_the_file_is_what_a_stranger_computes_from_its_scores(room, judged):
    load_result(room/'out'/'result.json'); res,rows = read_json(room/'out'/'result.json'),pd.read_csv(room/'out'/'scores.csv')
    assert [t['name'] for t in res['targets']]==['FaceForensics++','Celeb-DF-v2'] and res['protocol']['clips']==4 and res['protocol']['margin']==1.5
    for t in res['targets']:
        mine = rows[rows.target==t['name']]; v = mine.assign(video=mine.key.map(video_of)).groupby('video').agg(score=('score','mean'), label=('label','first'))
        for s,y,level in ((mine.score, mine.label, 'clip'), (v.score, v.label, 'video')):
            m = t['metrics'][level]; assert np.isclose(m['auc']['value'], roc_auc_score(y, s), atol=1e-9) and np.isclose(m['ap']['value'], average_precision_score(y, s), atol=1e-9)
        cut = res['source']['frozen']['threshold']; assert t['threshold']==cut and np.isclose(t['frozen']['fpr']['value'], (v.score[v.label==0]>=cut).mean()) # one threshold for all
        assert t['counts']['videos']==len(v)==t['coverage']['scored'] and set(t['controls'])=={'codec only','colour only','resolution only','shuffled labels','permuted'}
        assert t['metrics']['video']['tpr@1%']['value'] is None and '100' in t['metrics']['video']['tpr@1%']['note']
    assert res['cost']['dollars']>0 and res['cost']['clips']==len(rows) and len(res['detector']['code_sha256'])==64 and len(res['detector']['sha256'])==64

def test_choice_and_relation(room, judged):
    res = read_json(room/'out'/'result.json'); aucs = res['source']['candidates']
    assert set(aucs)=={'one','two'} and res['detector']['name']==max(aucs, key=aucs.get) and res['source']['name']=='FaceForensics++ val'
    assert [t['relation'] for t in res['targets']]==['in-domain','cross-dataset'] and res['targets'][0]['split']=='test'
    assert 'nothing on both sides' in res['targets'][0]['leakage'] and "people of the card" in res['targets'][1]['leakage']
    assert 'people' not in res['detector']['trained_on'][0] and res['detector']['trained_on'][0]['groups']==2
    shaken = res['targets'][1]['robustness']; assert {r['family'] for r in shaken}=={'undamaged','gamma'} and all(r['n']==4 for r in shaken)

def test_trained_people_are_not_judged(room):
    with pytest.raises(LeakError, match='trained on and judged: FaceForensics'):
        whole = read_dataset(room/'data'/'FaceForensics++'); m = Manifest([replace(v, split='') for v in whole]); m.save(room/'ff'/'all.jsonl')
        (room/'mixed').mkdir(); [(room/'mixed'/p.name).symlink_to(p) for p in (room/'ff').iterdir() if p.suffix=='.zip' or p.name=='store.json']; m.save(room/'mixed'/'manifest.jsonl')
        play('evaluate', given(room, 'one', targets=str(room/'mixed')))

def test_who_is_held_out_in_words_but_was_trained_on_by_the_card(room):
    "The split of today says man, the card of the weights says whom they have seen"
    play('prepare', dict(preset='tiny', store=str(room/'pack')))
    save_weights(room/'others', 'phase_a_best', build_stf_mamba(STFConfig.phase_a('tiny'), 'pack'), extra=dict(length=4, selection='last', trained_on=[dict(dataset='pack', people=['woman'], chosen_on=['man'])]))
    for who in ('woman','man'):
        with pytest.raises(LeakError, match=f'trained on and judged: {who}'): play('evaluate', dict(preset='tiny', store=str(room/'pack'), checkpoints=str(room/'others'), held_out=who))

def test_what_fixed_the_threshold_is_not_judged(room):
    with pytest.raises(LeakError, match='fixed the threshold'): play('evaluate', given(room, 'one', source=str(room/'val'), targets=str(room/'val')))

def test_several_weights_need_something_to_choose_on(room):
    with pytest.raises(ValueError, match='to choose between'): play('evaluate', given(room, 'one,two', targets=str(room/'ff')))

def test_another_crop_is_another_measurement(room):
    with pytest.raises(ProtocolError, match='cut with size 224.*96 px'): play('evaluate', given(room, 'one', targets=str(room/'cdf')))

def test_nothing_to_judge_and_a_test_part_as_source(room):
    with pytest.raises(ValueError, match='name targets'): play('evaluate', given(room, 'one'))
    with pytest.raises(Exception, match='no video has split'): play('evaluate', given(room, 'one', source=str(room/'mixed'), targets=str(room/'ff')))

def test_a_specialist_is_judged_by_the_same_protocol(room):
    s = play('evaluate', given(room, 'RR', preset='demo', targets=str(room/'cdf'), results=str(room/'rr'))); t, = s['res']['targets']
    assert s['detector'].kind=='Specialist' and 'native' in s['detector'].extras and t['relation']=='cross-dataset' and t['metrics']['frame' if s['detector'].length==1 else 'clip']
    assert any('threshold is .5' in c for c in s['res']['caveats']) and s['res']['source'] is None and t['calibration']['after'] is None

def test_a_baseline_is_trained_and_judged_by_the_same_notebooks(room):
    p = play('prepare', dict(preset='tiny', store=str(room/'pack'))); a = play('phase_a', dict(preset='tiny', baseline='SBI images', store=str(room/'pack'), steps=2))
    s = play('evaluate', dict(preset='tiny', baseline='SBI images', store=str(room/'pack'), steps=2, judge_pairs=4)); t, = s['res']['targets']
    assert s['detector'].length==1 and s['detector'].level=='frame' and s['detector'].sha256==a['card']['sha256'] and t['relation']=='self-made' and t['counts']['pairs']==4
    assert s['res']['detector']['config']['stages']==0 and s['res']['detector']['trained_on'][0]['dataset']=='pack'
