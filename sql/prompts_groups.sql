-- purpose:    as prompts.sql, for prompts of assigned groups: the group comes from uid and key
-- reads:      face_count, lang, caption, key
-- returns:    shard, row, uid, text, key
-- parameters: $min_faces, $lang
select shard, row, uid, caption as text, key
from samples
where face_count >= $min_faces
  and $lang in ('any', lang)
  -- and regexp_matches(caption, '\S')          -- leave out blank captions, which would fail
