"The face store: milliseconds to write a frame and to read a clip, and what the parts cost. The last line is one JSON object."
import json,shutil,statistics,tempfile,time
from pathlib import Path
import cv2,numpy as np,torch
from deepfake_nb.clips import ClipSampler,FaceStore,ShardWriter,decode_crop,encode_crop,open_shard
from deepfake_nb.faces import face_tracks
from deepfake_nb.pack import sample
from deepfake_nb.video import VideoFile

torch.set_num_threads(1); cv2.setNumThreads(1)

def best(f, n=7):
    "Median milliseconds of `n` calls"
    times = []
    for _ in range(n): t = time.process_time(); f(); times.append(1000*(time.process_time()-t))
    return statistics.median(times)

def main():
    folder,res = Path(tempfile.mkdtemp()),{}
    try:
        t = time.process_time(); track = next(face_tracks(VideoFile(sample('woman')), native=True, max_length=472)); T = len(track.crops)
        res['decode and track, ms a frame'] = 1000*(time.process_time()-t)/T
        for kind in ('jpeg','png'):
            def write():
                with ShardWriter(folder/kind/'v.zip', kind=kind) as out: out.add(track, 'd/real/as_is/v', 'woman')
            res[f'write {kind} and native, ms a frame'] = best(write, 1)/T
            res[f'{kind}, KB a crop'] = sum(len(encode_crop(c, kind)) for c in track.crops[::20])/len(track.crops[::20])/1024
            store = FaceStore(folder/kind); key,draw = store.tracks[0].key,ClipSampler(store.tracks, 16); i = iter(range(10**6))
            def read(): store.read(*draw(0, 0, next(i)), 16)
            res[f'read {kind}, ms a clip of 16 x 224'] = best(read, 25)
        res['read native, ms a clip of 16'] = best(lambda: store.read(key, 30, 16, native=True))-best(lambda: store.read(key, 30, 16))
        path = folder/'jpeg'/'v.zip'
        res['open and index, ms a shard of 472 frames'] = best(lambda: open_shard(path))
        res['check the seal, ms a MB'] = best(lambda: open_shard(path, sealed=True))/(path.stat().st_size/2**20)
        data = [encode_crop(c) for c in track.crops[:16]]
        res['of a read: decoding 16 JPEGs, ms'] = best(lambda: [decode_crop(b) for b in data], 25)
        res['of a read: landmarks of the whole track, ms'] = best(lambda: FaceStore._array(store, store.tracks[0], 'landmarks'), 25)
        res['draw a clip, ms'] = best(lambda: [draw(0, 0, k) for k in range(100)])/100
        res = {k:round(v, 3) for k,v in res.items()}
        for k,v in res.items(): print(f'{v:10.3f}  {k}')
        print(json.dumps(dict(benchmark='store', **res)))
    finally: shutil.rmtree(folder)

if __name__=='__main__': main()
