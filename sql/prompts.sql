-- purpose:    which captions are rewritten: samples with enough faces and a caption in the wanted language,
--             or in 'any'
-- reads:      face_count, lang, caption
-- returns:    shard, row, uid, text
-- parameters: $min_faces, $lang
select shard, row, uid, caption as text
from samples
where face_count >= $min_faces
  and $lang in ('any', lang)
  -- and regexp_matches(caption, '\S')          -- leave out blank captions, which would fail
  -- and list_max(face_scores) >= 0.99           -- cut by the detector's score instead
  -- and hash(uid) % 100 < 10                    -- the same tenth of the samples every time
