"Faces: milliseconds a tracked frame at 360p and 1080p, and what tracking saves against asking the detector in every frame. The last line is one JSON object."
import argparse,json,time
import cv2,numpy as np
from deepfake_nb.faces import FaceDetector,FaceMesh,Tracker,crop_matrix,face_tracks,roi_of_face,roi_of_marks,thumbnail,warp
from deepfake_nb.pack import sample
from deepfake_nb.video import Frame,VideoFile

def canvas(im): # the 360p picture in the middle of a 1080p frame
    out = np.full((1080,1920,3), 60, np.uint8); out[360:720,640:1280] = im
    return out

SIZES = {'360p':lambda im: im, '1080p, same face':canvas, '1080p, face 3x':lambda im: cv2.resize(im, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)}

def ms(f, items, repeats=3):
    "CPU milliseconds an item, the least of `repeats` runs; and the last result"
    best = []
    for _ in range(repeats):
        t = time.process_time(); res = f(items); best.append(time.process_time()-t)
    return 1e3*min(best)/len(items),res

def marks_of(frames, every):
    t = Tracker(every=every)
    return [next(iter(t(f).values()))[0] for f in frames]

def detect_each(frames):
    d,m = FaceDetector(),FaceMesh()
    return [m(f.image, roi_of_face(d(f.image)[0]))[0] for f in frames]

def measure(frames):
    d,m = FaceDetector(),FaceMesh()
    row = dict(thumbnail=ms(lambda fs: [thumbnail(f.image) for f in fs], frames)[0], detector=ms(lambda fs: [d(f.image) for f in fs], frames)[0])
    row['mesh_tracked'],marks = ms(lambda fs: marks_of(fs, 10**9), frames)
    row['detector_and_mesh_each_frame'] = ms(detect_each, frames)[0]
    row['crop'] = ms(lambda fs: [warp(f.image, crop_matrix(k), 224) for f,k in zip(fs, marks)], frames)[0]
    row['face_tracks'],tracks = ms(lambda fs: list(face_tracks(fs)), frames)
    row['face_tracks_detector_each_frame'] = ms(lambda fs: list(face_tracks(fs, every=1)), frames)[0]
    row['face_tracks_native'] = ms(lambda fs: list(face_tracks(fs, native=True)), frames)[0]
    row['saved_detector_each_frame_over_tracked'] = row['face_tracks_detector_each_frame']/row['face_tracks']
    row['face_px'] = float(np.median(tracks[0].boxes[:,3]-tracks[0].boxes[:,1])); row['tracked'] = sum(map(len, tracks))/len(frames)
    return {k:round(v, 2) for k,v in row.items()}

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__); p.add_argument('--frames', type=int, default=60); a = p.parse_args()
    cv2.setNumThreads(1)
    images,times = VideoFile(sample('woman')).read(0, a.frames)
    res = {n:measure([Frame(i, t, f(im)) for i,(im,t) in enumerate(zip(images, times))]) for n,f in SIZES.items()}
    for n,row in res.items(): print(n, row)
    print(json.dumps(dict(unit='CPU ms a frame, one thread, decoding not included', frames=a.frames, **res)))
