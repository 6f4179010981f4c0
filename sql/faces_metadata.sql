-- purpose:    which samples are looked at for faces, if the option metadata names files: the view `metadata` has
--             one row per uid of them, with uid and boxes
-- reads:      source_face_bboxes, source_width, source_height
-- returns:    shard, row, uid, boxes, boxes_from, width, height
-- parameters: $source
with both_sources as (
  select s.shard, s.row, s.uid,
         if($source = 'auto', s.source_face_bboxes, null) as own,        -- source = "metadata" uses only published boxes
         m.boxes as published,
         s.source_width as width,
         s.source_height as height
  from samples s left join metadata m on m.uid = s.uid
)
select shard, row, uid,
       coalesce(own, published) as boxes,
       case when own is not null then 'json' when published is not null then 'metadata' end as boxes_from,
       width, height
from both_sources
