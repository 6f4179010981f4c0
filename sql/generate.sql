-- purpose:    which prompts become images
-- reads:      key, prompt, image_draw, generate_status
-- returns:    shard, row, uid, key, prompt, draw
-- parameters: $draw
select shard, row, uid, key, prompt,
       -- the sample's present drawing, or the next one; the first is 0, the next after a failure 1
       coalesce(image_draw + $draw, case generate_status when 'failed' then $draw end, 0) as draw
from samples
where prompt is not null
